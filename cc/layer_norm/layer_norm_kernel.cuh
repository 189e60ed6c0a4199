// The vectorised CUDA kernels.
//
// Layout. A CTA is `groups` groups of `warps` warps (run-time numbers; see LayerNormTile). It takes
// `groups` rows at a time, a row per group, and its groups go through them in step. A thread owns
// the same columns of every row, kVecs vectors of N elements: vector v of thread t starts at column
// (v * group size + t) * N. Each thread copies its vectors of the next rows into shared memory
// ahead of time (`stages` slots), so loads stay in flight while a row is reduced and written. The
// weight and bias lie in shared memory as fp32, so a row costs no conversion of them.
//
// Forward CTAs take `steps` consecutive blocks of rows each, so that the rows in flight on the
// device are close together. Backward CTAs are persistent and sum the weight gradients of a
// thread's columns over their rows in registers; then the groups of a CTA add theirs up in shared
// memory and the CTA writes one partial, [grads, cols], which layer_norm_reduce_kernel sums over
// CTAs. Nothing is atomic, so the result is bitwise reproducible.
//
// kLean variants leave out what most calls do not use, dropout, scales and unusual output dtypes:
// at these bandwidths instructions are scarce (about 80 per element and multiprocessor).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "flashtrain/common/async_copy.cuh"
#include "flashtrain/common/philox.h"
#include "flashtrain/common/reduce.cuh"
#include "flashtrain/common/vec.cuh"
#include "flashtrain/layer_norm/layer_norm_cuda.h"

namespace flashtrain {

// All loads and stores of a vector are 16 bytes for the widest type, so fully coalesced.
template <typename A, typename B>
constexpr int VecElements() {
  return 16 / (sizeof(A) > sizeof(B) ? sizeof(A) : sizeof(B));
}

// Dropout, row scale and layer scale of one row.
template <typename Params>
struct DeviceScales {
  const Params& p;
  uint64_t seed = 0, offset = 0;
  uint32_t threshold = 0;
  float keep_scale = 1.0f;

  __device__ __forceinline__ explicit DeviceScales(const Params& params) : p(params) {
    if (p.dropout_p > 0.0f) {
      seed = p.rng_state[0];
      offset = p.rng_state[1];
      threshold = DropoutThreshold(p.dropout_p);
      keep_scale = 1.0f / (1.0f - p.dropout_p);
    }
  }

  __device__ __forceinline__ bool Any() const {
    return p.rowscale != nullptr || p.dropout_p > 0.0f || p.layerscale != nullptr;
  }

  __device__ __forceinline__ float RowScale(int64_t row) const {
    return p.rowscale == nullptr ? 1.0f : LoadScalar(p.rowscale, p.rowscale_dtype, row);
  }

  // x = x * rowscale * keep * layerscale. Bit i of the result: element i is kept.
  template <int N>
  __device__ __forceinline__ uint32_t Apply(float rowscale, int64_t row, int col,
                                            float (&x)[N]) const {
    uint32_t kept = 0xFFu;
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] *= rowscale;
    if (p.dropout_p > 0.0f) {
      kept = 0;
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        const Philox4 random = PhiloxBlock(seed, offset, row, static_cast<uint32_t>(col + i) / 4);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const bool keep = random.word[w] >= threshold;
          x[i + w] *= keep ? keep_scale : 0.0f;
          kept |= static_cast<uint32_t>(keep) << (i + w);
        }
      }
    }
    if (p.layerscale != nullptr) {
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] *= LoadScalar(p.layerscale, p.weight_dtype, col + i);
    }
    return kept;
  }
};

// A [cols] tensor as fp32 in shared memory, laid out so that a warp's 16-byte reads of vector v are
// contiguous. All threads of the CTA read the columns of their place in the group.
template <int kVecs, int kN>
struct SharedColumns {
  float4* base;
  int group_size;

  static constexpr int kFloat4s = kVecs * kN / 4;  // per thread of a group

  // value4(col) gives columns [col, col + 4). Called by all threads of the CTA.
  template <typename F>
  __device__ __forceinline__ void Fill(int64_t cols, F value4) const {
    constexpr int kParts = kN / 4;
    for (int part = static_cast<int>(threadIdx.x); 4 * part < cols; part += blockDim.x) {
      const int vec = part / kParts, v = vec / group_size;
      base[(v * kParts + part % kParts) * group_size + vec % group_size] = value4(4 * part);
    }
  }

  __device__ __forceinline__ void Read(const WarpGroup& group, int v, float (&out)[kN]) const {
#pragma unroll
    for (int h = 0; h < kN / 4; ++h) {
      const float4 f = base[(v * (kN / 4) + h) * group_size + group.thread];
      out[4 * h] = f.x, out[4 * h + 1] = f.y, out[4 * h + 2] = f.z, out[4 * h + 3] = f.w;
    }
  }
};

// The factor of the normalised values: weight, 1 + weight or 1.
template <typename Params>
__device__ __forceinline__ float WeightAt(const Params& p, int64_t col) {
  if (p.weight == nullptr) return 1.0f;
  return LoadScalar(p.weight, p.weight_dtype, col) + (p.zero_centered_weight ? 1.0f : 0.0f);
}

template <typename Params>
__device__ __forceinline__ float4 WeightAt4(const Params& p, int64_t col) {
  if (p.weight == nullptr) return make_float4(1.0f, 1.0f, 1.0f, 1.0f);
  float4 w = LoadScalar4(p.weight, p.weight_dtype, col);
  if (p.zero_centered_weight) w.x += 1.0f, w.y += 1.0f, w.z += 1.0f, w.w += 1.0f;
  return w;
}

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

// The slots of shared memory through which a group's rows come: `stages` of them, each with the
// CTA's vectors of tensors of types T... in turn. Only the owner of a vector touches it.
template <int kVecs, int kN, typename... T>
struct RowPipeline {
  static constexpr int kThreadBytes = kVecs * kN * (0 + ... + static_cast<int>(sizeof(T)));

  char* base;
  int stages;
  int slot = 0;  // of the current row

  // Vector v of the tensor that `bytes_before` bytes per element precede in a slot.
  template <typename Tensor>
  __device__ __forceinline__ RawVec<Tensor, kN>* Vec(int in_slot, int bytes_before, int v) const {
    const int threads = static_cast<int>(blockDim.x);
    char* tensor = base + threads * (in_slot * kThreadBytes + kVecs * kN * bytes_before);
    return reinterpret_cast<RawVec<Tensor, kN>*>(tensor) + v * threads + threadIdx.x;
  }

  // The slot of the row that comes `ahead` rows after the current one; ahead <= stages.
  __device__ __forceinline__ int Slot(int ahead) const {
    const int s = slot + ahead;
    return s < stages ? s : s - stages;
  }
};

// Whether vector v of this thread holds columns of the row, and which.
template <int kN>
__device__ __forceinline__ int VecColumn(const WarpGroup& group, int v) {
  return (v * group.size() + group.thread) * kN;
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

  __device__ __forceinline__ void Load(const LayerNormBackwardParams& p, const WarpGroup& group,
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
                                               const WarpGroup& group,
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
      const float wdz = dz[i] * w[i];
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
                                              const WarpGroup& group, int64_t row,
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
      g[i] = statistics.rstd * (dz[i] * w[i] - means.y - xhat * means.x);
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
__device__ __forceinline__ void WritePartial(const WarpGroup& group, int groups, int64_t cols,
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
__global__ void __launch_bounds__(BackwardTile<kVecs>::kMaxThreads, BackwardTile<kVecs>::kMinCtas)
    layer_norm_backward_kernel(const __grid_constant__ LayerNormBackwardParams p,
                               const __grid_constant__ LayerNormTile tile) {
  using Pipeline = BackwardPipeline<TZ, TX, kVecs>;
  using Columns = SharedColumns<kVecs, Pipeline::kN>;
  __shared__ float2 shared[LayerNormTile::kMaxGroups][2][WarpGroup::kMaxWarps];
  extern __shared__ float4 dynamic_shared[];
  const WarpGroup group(tile.warps);
  const Columns weight{dynamic_shared, group.size()};
  float4* const slots = weight.base + Columns::kFloat4s * group.size();
  const DeviceScales<LayerNormBackwardParams> scales(p);
  const float inverse_cols = 1.0f / static_cast<float>(p.cols);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * tile.groups;
  int64_t row = static_cast<int64_t>(blockIdx.x) * tile.groups + group.index;
  Pipeline pipeline{{reinterpret_cast<char*>(slots), tile.stages}};
  const int ahead = tile.stages - 1;
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
  float* partial =
      static_cast<float*>(p.workspace) + static_cast<int64_t>(blockIdx.x) * tile.num_grads * p.cols;
  if (p.dweight != nullptr) {
    WritePartial(group, tile.groups, p.cols, grads.dweight, sums, partial);
    partial += p.cols;
  }
  if (p.dbias != nullptr) WritePartial(group, tile.groups, p.cols, grads.dbias, sums, partial);
}

}  // namespace flashtrain
