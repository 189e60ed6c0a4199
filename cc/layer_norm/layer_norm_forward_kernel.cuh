// Forward: one pass over each row, which goes from global memory to registers, as fp32.
//
// A CTA takes one row per group and ends, so that loads overlap across many CTAs and the last ones
// of a grid end close together. Short rows are bound by instructions as much as by memory, so loads
// come before anything that takes long to compute, a group is one warp where it can be, and what is
// known of a whole call is decided once a row. On one H100, bf16 with residual, 32,768 rows, this
// moves 2.77 / 2.82 / 2.87 / 2.91 / 2.97 TB/s at 768 / 1024 / 1600 / 2048 / 4096 columns, a device
// copy of as many bytes 2.84 / 2.93 at the first two. Rows loaded ahead into shared memory, as in
// backward, and weights loaded ahead of the sums are slower; streaming stores (st.global.cs) lose a
// quarter.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "flashtrain/layer_norm/layer_norm_kernel.cuh"

namespace flashtrain {

// Bytes 1 or 0 for the low N bits of `kept`.
template <int N>
__device__ __forceinline__ void StoreMask(uint32_t kept, uint8_t* mask) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const uint32_t bits = kept >> i;
    const uint32_t bytes = (bits & 1u) | (bits & 2u) << 7 | (bits & 4u) << 14 | (bits & 8u) << 21;
    *reinterpret_cast<uint32_t*>(mask + i) = bytes;
  }
}

// Loads a row, writes x and the mask where wanted, and returns the thread's sum of x.
template <bool kLean, typename T0, typename TX, int kVecs, int kN>
__device__ __forceinline__ float ForwardSum(const LayerNormForwardParams& p,
                                            const DeviceScales<LayerNormForwardParams>& scales,
                                            const RowWarps& group, int64_t row,
                                            float (&x)[kVecs][kN]) {
  const T0* x0_row = static_cast<const T0*>(p.x0) + row * p.x0_row_stride;
  const TX* residual_row = static_cast<const TX*>(p.residual);
  if (p.residual != nullptr) residual_row += row * p.residual_row_stride;
  RawVec<T0, kN> x0[kVecs];
  RawVec<TX, kN> residual[kVecs];
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {  // all loads before any use
    const int col = VecColumn<kN>(group, v);
    if (col >= p.cols) continue;
    x0[v] = LoadRaw<T0, kN>(x0_row, col);
    if (p.residual != nullptr) {
      residual[v] = LoadRaw<TX, kN>(residual_row, col);
    }
  }
  const float rowscale = kLean ? 1.0f : scales.RowScale(row);
  float sum = 0.0f;
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const int col = VecColumn<kN>(group, v);
    if (col >= p.cols) continue;
    ToFloat(x0[v], x[v]);
    if constexpr (!kLean) {
      const uint32_t kept = scales.Apply(rowscale, row, col, x[v]);
      if (p.dropout_mask != nullptr) StoreMask<kN>(kept, p.dropout_mask + row * p.cols + col);
    }
    if (p.residual != nullptr) {
      float addend[kN];
      ToFloat(residual[v], addend);
#pragma unroll
      for (int i = 0; i < kN; ++i) x[v][i] += addend[i];
    }
    ToFloat(FromFloat<TX>(x[v]), x[v]);  // see "Numerics" in layer_norm.h
    if (p.x != nullptr) StoreVec<TX>(x[v], p.x, row * p.x_row_stride + col);
#pragma unroll
    for (int i = 0; i < kN; ++i) sum += x[v][i];
  }
  return sum;
}

// Writes z, of x0's dtype, with a weight and a bias, both of dtype TW.
template <typename T0, typename TW, int kVecs, int kN>
__device__ __forceinline__ void ForwardStoreAffine(const LayerNormForwardParams& p,
                                                   const RowWarps& group, int64_t row, float mean,
                                                   float rstd, float (&x)[kVecs][kN]) {
  constexpr int kStep = 16 / sizeof(TW) < kN ? 16 / sizeof(TW) : kN;
  T0* z_row = static_cast<T0*>(p.z) + row * p.z_row_stride;
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const int col = VecColumn<kN>(group, v);
    if (col >= p.cols) continue;
#pragma unroll
    for (int i = 0; i < kN; i += kStep) {
      float w[kStep], b[kStep];
      ToFloat(LoadRaw<TW, kStep>(p.weight, col + i), w);
      ToFloat(LoadRaw<TW, kStep>(p.bias, col + i), b);
#pragma unroll
      for (int j = 0; j < kStep; ++j) x[v][i + j] = (x[v][i + j] - mean) * rstd * w[j] + b[j];
    }
    StoreVec<T0>(x[v], z_row, col);
  }
}

// Writes z. Lean: z has x0's dtype.
template <bool kLean, typename T0, int kVecs, int kN>
__device__ __forceinline__ void ForwardStore(const LayerNormForwardParams& p, const RowWarps& group,
                                             int64_t row, float mean, float rstd,
                                             float (&x)[kVecs][kN]) {
  if constexpr (kLean) {
    if (p.weight != nullptr && p.bias != nullptr && !p.zero_centered_weight) {
      if (p.weight_dtype == DType::kFloat32) {
        return ForwardStoreAffine<T0, float>(p, group, row, mean, rstd, x);
      }
      if (p.weight_dtype == p.x0_dtype) {
        return ForwardStoreAffine<T0, T0>(p, group, row, mean, rstd, x);
      }
    }
  }
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const int col = VecColumn<kN>(group, v);
    if (col >= p.cols) continue;
    float w[kN], b[kN];
    LoadColumns(p.weight, p.weight_dtype, col, 1.0f, w);
    LoadColumns(p.bias, p.weight_dtype, col, 0.0f, b);
    if (p.zero_centered_weight) {
#pragma unroll
      for (int i = 0; i < kN; ++i) w[i] += 1.0f;
    }
#pragma unroll
    for (int i = 0; i < kN; ++i) x[v][i] = (x[v][i] - mean) * rstd * w[i] + b[i];
    const int64_t index = row * p.z_row_stride + col;
    if constexpr (kLean) {
      StoreVec<T0>(x[v], p.z, index);
    } else {
      StoreVec(x[v], p.z, p.z_dtype, index);
    }
  }
}

template <typename T0, typename TX, int kVecs, bool kLean>
__global__ void __launch_bounds__(ForwardLimits<kVecs, Elements<T0, TX>::kVec, kLean>::kMaxThreads,
                                  ForwardLimits<kVecs, Elements<T0, TX>::kVec, kLean>::kMinCtas)
    layer_norm_forward_kernel(const __grid_constant__ LayerNormForwardParams p,
                              const __grid_constant__ LayerNormLaunch launch) {
  constexpr int kN = Elements<T0, TX>::kVec;
  __shared__ float shared[2]
                         [ForwardLimits<kVecs, kN, kLean>::kMaxThreads / 32];  // by warp of the CTA
  const RowWarps group;
  const int first_warp = group.index * group.warps;
  const DeviceScales<LayerNormForwardParams> scales(p);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * launch.groups + group.index;
  const bool active = row < p.rows;
  float x[kVecs][kN];
  const float sum = active ? ForwardSum<kLean, T0, TX>(p, scales, group, row, x) : 0.0f;
  const float inverse_cols = 1.0f / static_cast<float>(p.cols);
  float mean = 0.0f;
  if (!p.is_rms_norm) {
    const float total = group.Sum(sum, shared[0] + first_warp);
    mean = total * inverse_cols;
    // The rounding of the inverse and of the product would be half of a large mean's error.
    mean = fmaf(fmaf(-mean, static_cast<float>(p.cols), total), inverse_cols, mean);
  }
  float squares = 0.0f;
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    if (!active || VecColumn<kN>(group, v) >= p.cols) continue;
#pragma unroll
    for (int i = 0; i < kN; ++i) squares += (x[v][i] - mean) * (x[v][i] - mean);
  }
  const float variance = group.Sum(squares, shared[1] + first_warp) * inverse_cols;
  if (!active) return;
  const float rstd = rsqrtf(variance + p.epsilon);
  if (group.thread == 0) {
    if (p.mean != nullptr) p.mean[row] = mean;
    if (p.rstd != nullptr) p.rstd[row] = rstd;
  }
  ForwardStore<kLean, T0>(p, group, row, mean, rstd, x);
}

}  // namespace flashtrain
