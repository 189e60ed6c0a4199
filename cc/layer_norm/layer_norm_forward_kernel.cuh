// Forward: one pass over each row, which is held in registers as fp32. See layer_norm_kernel.cuh.
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

template <typename T0, typename TX, int kVecs>
struct ForwardPipeline : RowPipeline<kVecs, VecElements<T0, TX>(), T0, TX> {
  static constexpr int kN = VecElements<T0, TX>();

  __device__ __forceinline__ RawVec<T0, kN>* X0(int slot, int v) const {
    return this->template Vec<T0>(slot, 0, v);
  }
  __device__ __forceinline__ RawVec<TX, kN>* Residual(int slot, int v) const {
    return this->template Vec<TX>(slot, sizeof(T0), v);
  }

  // Starts loading a row into a slot; past the last row, only keeps the count of groups.
  __device__ __forceinline__ void Load(const LayerNormForwardParams& p, const WarpGroup& group,
                                       int64_t row, int slot) const {
    if (row < p.rows) {
#pragma unroll
      for (int v = 0; v < kVecs; ++v) {
        const int col = VecColumn<kN>(group, v);
        if (col >= p.cols) continue;
        AsyncCopy(X0(slot, v), p.x0, row * p.x0_row_stride + col);
        if (p.residual != nullptr) {
          AsyncCopy(Residual(slot, v), p.residual, row * p.residual_row_stride + col);
        }
      }
    }
    AsyncCommit();
  }
};

// Computes a row's x, writes the mask where wanted, and returns the thread's sum.
template <bool kLean, typename T0, typename TX, int kVecs, int kN>
__device__ __forceinline__ float ForwardSum(const LayerNormForwardParams& p,
                                            const DeviceScales<LayerNormForwardParams>& scales,
                                            const WarpGroup& group, int64_t row,
                                            const ForwardPipeline<T0, TX, kVecs>& pipeline,
                                            float (&x)[kVecs][kN]) {
  const float rowscale = kLean ? 1.0f : scales.RowScale(row);
  float sum = 0.0f;
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const int col = VecColumn<kN>(group, v);
    if (col >= p.cols) continue;
    ToFloat(*pipeline.X0(pipeline.slot, v), x[v]);
    if constexpr (!kLean) {
      const uint32_t kept = scales.Apply(rowscale, row, col, x[v]);
      if (p.dropout_mask != nullptr) StoreMask<kN>(kept, p.dropout_mask + row * p.cols + col);
    }
    if (p.residual != nullptr) {
      float residual[kN];
      ToFloat(*pipeline.Residual(pipeline.slot, v), residual);
#pragma unroll
      for (int i = 0; i < kN; ++i) x[v][i] += residual[i];
    }
    ToFloat(FromFloat<TX>(x[v]), x[v]);  // see "Numerics" in layer_norm.h
#pragma unroll
    for (int i = 0; i < kN; ++i) sum += x[v][i];
  }
  return sum;
}

// Writes x where wanted, and z. Lean: z has x0's dtype.
template <bool kLean, typename T0, typename TX, int kVecs, int kN>
__device__ __forceinline__ void ForwardStore(const LayerNormForwardParams& p,
                                             const WarpGroup& group, int64_t row, float mean,
                                             float rstd, const SharedColumns<kVecs, kN>& weight,
                                             const SharedColumns<kVecs, kN>& bias,
                                             float (&x)[kVecs][kN]) {
  if (group.thread == 0) {
    if (p.mean != nullptr) p.mean[row] = mean;
    if (p.rstd != nullptr) p.rstd[row] = rstd;
  }
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const int col = VecColumn<kN>(group, v);
    if (col >= p.cols) continue;
    if (p.x != nullptr) StoreVec<TX>(x[v], p.x, row * p.x_row_stride + col);
    float w[kN], b[kN] = {};
    weight.Read(group, v, w);
    if (p.bias != nullptr) bias.Read(group, v, b);
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

// Dynamic shared memory: weight, bias, then the pipeline's slots.
template <typename T0, typename TX, int kVecs, bool kLean>
__global__ void __launch_bounds__(ForwardTile<kVecs>::kMaxThreads, ForwardTile<kVecs>::kMinCtas)
    layer_norm_forward_kernel(const __grid_constant__ LayerNormForwardParams p,
                              const __grid_constant__ LayerNormTile tile) {
  using Pipeline = ForwardPipeline<T0, TX, kVecs>;
  constexpr int kN = Pipeline::kN;
  using Columns = SharedColumns<kVecs, kN>;
  __shared__ float shared[LayerNormTile::kMaxGroups][2][WarpGroup::kMaxWarps];
  extern __shared__ float4 dynamic_shared[];
  const WarpGroup group(tile.warps);
  const Columns weight{dynamic_shared, group.size()};
  const Columns bias{weight.base + Columns::kFloat4s * group.size(), group.size()};
  float4* const slots = bias.base + Columns::kFloat4s * group.size();
  const DeviceScales<LayerNormForwardParams> scales(p);
  const float inverse_cols = 1.0f / static_cast<float>(p.cols);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * tile.steps * tile.groups + group.index;
  Pipeline pipeline{{reinterpret_cast<char*>(slots), tile.stages}};
  const int ahead = tile.stages - 1;
  const auto load = [&](int step, int slot) {
    pipeline.Load(p, group, step < tile.steps ? begin + step * tile.groups : p.rows, slot);
  };
  for (int i = 0; i < ahead; ++i) load(i, i);
  weight.Fill(p.cols, [&](int col) { return WeightAt4(p, col); });
  if (p.bias != nullptr) {
    bias.Fill(p.cols, [&](int col) { return LoadScalar4(p.bias, p.weight_dtype, col); });
  }
  __syncthreads();
  for (int step = 0; step < tile.steps; ++step) {
    load(step + ahead, pipeline.Slot(ahead));
    AsyncWait(ahead);
    const int64_t row = begin + step * tile.groups;
    const bool active = row < p.rows;
    float x[kVecs][kN];
    const float sum = active ? ForwardSum<kLean>(p, scales, group, row, pipeline, x) : 0.0f;
    float mean = 0.0f;
    if (!p.is_rms_norm) mean = group.Sum(sum, shared[group.index][0]) * inverse_cols;
    float squares = 0.0f;
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      if (!active || VecColumn<kN>(group, v) >= p.cols) continue;
#pragma unroll
      for (int i = 0; i < kN; ++i) squares += (x[v][i] - mean) * (x[v][i] - mean);
    }
    // RMSNorm has one reduction a row, so its buffers alternate by row.
    const int buffer = p.is_rms_norm ? step & 1 : 1;
    const float variance = group.Sum(squares, shared[group.index][buffer]) * inverse_cols;
    if (active) {
      const float rstd = rsqrtf(variance + p.epsilon);
      ForwardStore<kLean, T0, TX>(p, group, row, mean, rstd, weight, bias, x);
    }
    pipeline.slot = pipeline.Slot(1);
  }
}

}  // namespace flashtrain
