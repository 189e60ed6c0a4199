// What the vectorised CUDA kernels share: their layout and the parts that move data.
//
// Layout. A CTA is `groups` groups of `warps` warps (run-time numbers; see LayerNormLaunch). It
// takes `groups` rows at a time, a row per group, and its groups go through them in step. A thread
// owns the same columns of every row, kVecs vectors of N elements: vector v of thread t starts at
// column (v * group size + t) * N.
//
// Backward CTAs are persistent. Each thread copies its vectors of the next rows into shared memory
// ahead of time (`stages` slots), so loads stay in flight while a row is reduced and written; the
// weight lies in shared memory as fp32, so a row costs no conversion of it. The weight gradients of
// a thread's columns are summed over its rows in registers; then the groups of a CTA add theirs up
// in shared memory and the CTA writes one partial, [grads, cols], which layer_norm_reduce_kernel
// sums over CTAs. Nothing is atomic, so the result is bitwise reproducible.
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

// For device code, which may not call VecElements.
template <typename A, typename B>
struct Elements {
  static constexpr int kVec = VecElements<A, B>();
};

template <typename T, int N>
__device__ __forceinline__ RawVec<T, N> LoadRaw(const void* base, int64_t index) {
  return *reinterpret_cast<const RawVec<T, N>*>(static_cast<const T*>(base) + index);
}

// Elements [col, col + N) of an aligned [cols] tensor of any dtype; all `absent` if it is null.
template <int N>
__device__ __forceinline__ void LoadColumns(const void* base, DType dtype, int col, float absent,
                                            float (&out)[N]) {
  if (base == nullptr) {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = absent;
  } else if (dtype == DType::kFloat32) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      float part[4];
      ToFloat(LoadRaw<float, 4>(base, col + i), part);
#pragma unroll
      for (int j = 0; j < 4; ++j) out[i + j] = part[j];
    }
  } else if (dtype == DType::kFloat16) {
    ToFloat(LoadRaw<__half, N>(base, col), out);
  } else {
    ToFloat(LoadRaw<__nv_bfloat16, N>(base, col), out);
  }
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

  __device__ __forceinline__ void Read(const RowWarps& group, int v, float (&out)[kN]) const {
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
__device__ __forceinline__ int VecColumn(const RowWarps& group, int v) {
  return (v * group.size() + group.thread) * kN;
}

}  // namespace flashtrain
