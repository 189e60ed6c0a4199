// Backward: with xhat = (x - mean) * rstd and wdz = weight * dz,
//
//   g = rstd * (wdz - mean(wdz) - xhat * mean(xhat * wdz)) + dx       (RMSNorm: without mean(wdz))
//   dresidual = g,  dx0 = g * scales,  dweight = sum over rows of dz * xhat,  dbias = sum of dz.
//
// Both passes over a row read it from shared memory. See layer_norm_kernel.cuh.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "flashtrain/layer_norm/layer_norm_kernel.cuh"

namespace flashtrain {

template <typename TZ, typename TX, int kVecs>
struct BackwardPipeline : RowPipeline<kVecs, VecElements<TZ, TX>(), TZ, TX, TX> {
  static constexpr int kN = VecElements<TZ, TX>();

  __device__ __forceinline__ RawVec<TZ, kN>* Dz(int slot, int v) const {
    return this->template Vec<TZ>(slot, 0, v);
  }
  __device__ __forceinline__ RawVec<TX, kN>* X(int slot, int v) const {
    return this->template Vec<TX>(slot, sizeof(TZ), v);
  }
  __device__ __forceinline__ RawVec<TX, kN>* Dx(int slot, int v) const {
    return this->template Vec<TX>(slot, sizeof(TZ) + sizeof(TX), v);
  }

  __device__ __forceinline__ void Load(const LayerNormBackwardParams& p, const RowWarps& group,
                                       int64_t row, int slot) const {
    if (row < p.rows) {
#pragma unroll
      for (int v = 0; v < kVecs; ++v) {
        const int col = VecColumn<kN>(group, v);
        if (col >= p.cols) continue;
        AsyncCopy(Dz(slot, v), p.dz, row * p.dz_row_stride + col);
        AsyncCopy(X(slot, v), p.x, row * p.x_row_stride + col);
        if (p.dx != nullptr) AsyncCopy(Dx(slot, v), p.dx, row * p.dx_row_stride + col);
      }
    }
    AsyncCommit();
  }
};

struct RowStatistics {
  float mean = 0.0f, rstd = 0.0f;

  __device__ __forceinline__ void Load(const LayerNormBackwardParams& p, int64_t row) {
    if (row >= p.rows) return;
    if (!p.is_rms_norm) mean = p.mean[row];
    rstd = p.rstd[row];
  }
};

// The sums over the rows so far of the weight gradients of a thread's columns.
template <int kVecs, int kN>
struct WeightGradients {
  float dweight[kVecs][kN] = {};
  float dbias[kVecs][kN] = {};
};

// Adds a row's terms to the weight gradients; returns the thread's sums of xhat * wdz and of wdz.
template <typename TZ, typename TX, int kVecs, int kN>
__device__ __forceinline__ float2 BackwardSums(const LayerNormBackwardParams& p,
                                               const RowWarps& group,
                                               const BackwardPipeline<TZ, TX, kVecs>& pipeline,
                                               const RowStatistics& statistics,
                                               const SharedColumns<kVecs, kN>& weight,
                                               WeightGradients<kVecs, kN>& grads) {
  float2 sums = make_float2(0.0f, 0.0f);
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    if (VecColumn<kN>(group, v) >= p.cols) continue;
    float dz[kN], x[kN], w[kN];
    ToFloat(*pipeline.Dz(pipeline.slot, v), dz);
    ToFloat(*pipeline.X(pipeline.slot, v), x);
    weight.Read(group, v, w);
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const float xhat = (x[i] - statistics.mean) * statistics.rstd;
      const float wdz = __fmul_rn(dz[i], w[i]);  // never fused: both passes see the same number
      sums.x += xhat * wdz;
      sums.y += wdz;
      grads.dweight[v][i] += dz[i] * xhat;
      grads.dbias[v][i] += dz[i];
    }
  }
  return sums;
}

// Writes dresidual and dx0. means: the row's means of xhat * wdz and of wdz (0 for RMSNorm).
// Lean: x0 has dz's dtype.
template <bool kLean, typename TZ, typename TX, int kVecs, int kN>
__device__ __forceinline__ void BackwardStore(const LayerNormBackwardParams& p,
                                              const DeviceScales<LayerNormBackwardParams>& scales,
                                              const RowWarps& group, int64_t row,
                                              const BackwardPipeline<TZ, TX, kVecs>& pipeline,
                                              const RowStatistics& statistics, float2 means,
                                              const SharedColumns<kVecs, kN>& weight) {
  const float rowscale = kLean ? 1.0f : scales.RowScale(row);
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const int col = VecColumn<kN>(group, v);
    if (col >= p.cols) continue;
    float dz[kN], x[kN], w[kN], g[kN];
    ToFloat(*pipeline.Dz(pipeline.slot, v), dz);
    ToFloat(*pipeline.X(pipeline.slot, v), x);
    weight.Read(group, v, w);
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const float xhat = (x[i] - statistics.mean) * statistics.rstd;
      g[i] = statistics.rstd * (__fmul_rn(dz[i], w[i]) - means.y - xhat * means.x);
    }
    if (p.dx != nullptr) {
      float dx[kN];
      ToFloat(*pipeline.Dx(pipeline.slot, v), dx);
#pragma unroll
      for (int i = 0; i < kN; ++i) g[i] += dx[i];
    }
    if (p.dresidual != nullptr) {
      StoreVec<TX>(g, p.dresidual, row * p.dresidual_row_stride + col);
    }
    if (p.dx0 == nullptr) continue;
    const int64_t index = row * p.dx0_row_stride + col;
    if constexpr (kLean) {
      StoreVec<TZ>(g, p.dx0, index);
    } else {
      scales.Apply(rowscale, row, col, g);
      StoreVec(g, p.dx0, p.x0_dtype, index);
    }
  }
}

// Adds up one gradient over the CTA's groups, in a tree, and writes the CTA's partial, [cols].
// shared: [groups / 2 rounded up, cols]. Called by all threads.
template <int kVecs, int kN>
__device__ __forceinline__ void WritePartial(const RowWarps& group, int groups, int64_t cols,
                                             float (&grad)[kVecs][kN], float* shared,
                                             float* partial) {
#pragma unroll 1
  for (int count = groups; count > 1; count = (count + 1) / 2) {
    const int half = (count + 1) / 2;
    const bool gives = group.index >= half && group.index < count;
    const bool takes = group.index + half < count;
    float* row = shared + (gives ? group.index - half : group.index) * cols;
    __syncthreads();  // earlier reads of `shared` are done
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      const int col = VecColumn<kN>(group, v);
      if (gives && col < cols) StoreVec<float>(grad[v], row, col);
    }
    __syncthreads();
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      const int col = VecColumn<kN>(group, v);
      if (!takes || col >= cols) continue;
#pragma unroll
      for (int i = 0; i < kN; ++i) grad[v][i] += row[col + i];
    }
  }
  if (group.index != 0) return;
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const int col = VecColumn<kN>(group, v);
    if (col < cols) StoreVec<float>(grad[v], partial, col);
  }
}

// Dynamic shared memory: weight, then the pipeline's slots (reused for the gradients' sums).
template <typename TZ, typename TX, int kVecs, bool kLean>
__global__ void __launch_bounds__(BackwardLimits<kVecs>::kMaxThreads,
                                  BackwardLimits<kVecs>::kMinCtas)
    layer_norm_backward_kernel(const __grid_constant__ LayerNormBackwardParams p,
                               const __grid_constant__ LayerNormLaunch launch) {
  using Pipeline = BackwardPipeline<TZ, TX, kVecs>;
  using Columns = SharedColumns<kVecs, Pipeline::kN>;
  __shared__ float2 shared[LayerNormLaunch::kMaxGroups][2][RowWarps::kMaxWarps];
  extern __shared__ float4 dynamic_shared[];
  const RowWarps group(launch.warps);
  const Columns weight{dynamic_shared, group.size()};
  float4* const slots = weight.base + Columns::kFloat4s * group.size();
  const DeviceScales<LayerNormBackwardParams> scales(p);
  const float inverse_cols = 1.0f / static_cast<float>(p.cols);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * launch.groups;
  int64_t row = static_cast<int64_t>(blockIdx.x) * launch.groups + group.index;
  Pipeline pipeline{{reinterpret_cast<char*>(slots), launch.stages}};
  const int ahead = launch.stages - 1;
  for (int i = 0; i < ahead; ++i) pipeline.Load(p, group, row + i * stride, i);
  RowStatistics statistics, next;
  next.Load(p, row);
  weight.Fill(p.cols, [&](int col) { return WeightAt4(p, col); });
  __syncthreads();
  WeightGradients<kVecs, Pipeline::kN> grads;
  for (int buffer = 0; row - group.index < p.rows; row += stride, buffer ^= 1) {
    pipeline.Load(p, group, row + ahead * stride, pipeline.Slot(ahead));
    statistics = next;
    next.Load(p, row + stride);
    AsyncWait(ahead);
    const bool active = row < p.rows;
    float2 means = make_float2(0.0f, 0.0f);
    if (active) means = BackwardSums(p, group, pipeline, statistics, weight, grads);
    means = group.Sum2(means, shared[group.index][buffer]);
    means.x *= inverse_cols;
    means.y *= p.is_rms_norm ? 0.0f : inverse_cols;
    if (active) {
      BackwardStore<kLean>(p, scales, group, row, pipeline, statistics, means, weight);
    }
    pipeline.slot = pipeline.Slot(1);
  }
  AsyncWait(0);
  // This CTA's partials: dweight, then dbias, whichever are wanted.
  float* const sums = reinterpret_cast<float*>(slots);
  float* partial = static_cast<float*>(p.workspace) +
                   static_cast<int64_t>(blockIdx.x) * launch.num_grads * p.cols;
  if (p.dweight != nullptr) {
    WritePartial(group, launch.groups, p.cols, grads.dweight, sums, partial);
    partial += p.cols;
  }
  if (p.dbias != nullptr) WritePartial(group, launch.groups, p.cols, grads.dbias, sums, partial);
}

}  // namespace flashtrain
