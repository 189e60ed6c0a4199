// CUDA kernels. A CTA takes a row at a time, with as many threads as its length asks for.
//
// A row is read in vectors of 16 bytes from its first aligned element on; the few elements before
// and after are taken one by one. So any stride and alignment has the same path. A thread handles
// kUnroll vectors at once, and rescales its sum of exponentials once for all of them, where their
// maximum is above the running one. The threads' (maximum, sum) pairs are combined in a fixed
// order.
//
// The gradient is written by the thread that read the element, so it may go where the logits are.
// In one pass with the losses the row is kept in shared memory between its two uses if it fits.
// Then CTAs are persistent, and a thread that has written the gradient of a vector starts copying
// the next row's into its place. Longer rows are read again, mostly from the second-level cache.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "flashtrain/common/async_copy.cuh"
#include "flashtrain/common/reduce.cuh"
#include "flashtrain/common/vec.cuh"
#include "flashtrain/cross_entropy/cross_entropy_cuda.h"
#include "flashtrain/cross_entropy/cross_entropy_row.h"

namespace flashtrain {

template <typename T>
constexpr DType kDTypeOf = std::is_same_v<T, float>    ? DType::kFloat32
                           : std::is_same_v<T, __half> ? DType::kFloat16
                                                       : DType::kBFloat16;

// `size` elements of a row as seen from the address of the first: `head` elements, `vecs` aligned
// vectors of kN, and a tail.
template <typename T>
struct RowSpan {
  static constexpr int kN = 16 / sizeof(T);
  using Vec = RawVec<T, kN>;

  const T* first = nullptr;
  int64_t size = 0;
  int head = 0, vecs = 0;  // at most 2^32 / 4 vectors

  __device__ __forceinline__ RowSpan() {}
  __device__ __forceinline__ RowSpan(const T* first, int64_t size) : first(first), size(size) {
    const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(first) % 16 / sizeof(T));
    const int to_boundary = (kN - misaligned) % kN;
    head = size < to_boundary ? static_cast<int>(size) : to_boundary;
    vecs = static_cast<int>((size - head) / kN);
  }

  __device__ __forceinline__ const Vec* Vecs() const {
    return reinterpret_cast<const Vec*>(first + head);
  }

  // The calling thread's element outside the vectors, or -1. There are at most 2 * kN - 2 < 32.
  __device__ __forceinline__ int64_t Loose() const {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < head) return thread;
    const int64_t i = static_cast<int64_t>(vecs) * kN + thread;
    return i < size ? i : -1;
  }
};

// The larger of two packed pairs, element by element; NaN counts as none.
template <typename T>
__device__ __forceinline__ uint32_t MaxWord(uint32_t a, uint32_t b) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
  } else {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    Pair x, y;
    memcpy(&x, &a, sizeof(x));
    memcpy(&y, &b, sizeof(y));
    const Pair larger = __hmax2(x, y);
    uint32_t word;
    memcpy(&word, &larger, sizeof(word));
    return word;
  }
}

// The largest of the elements of a few vectors, on the packed words: converting them would keep
// four times the registers alive.
template <typename T, int kN, int kCount>
__device__ __forceinline__ float MaxOf(const RawVec<T, kN> (&raw)[kCount]) {
  uint32_t word = raw[0].word[0];
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
#pragma unroll
    for (int w = 0; w < 4; ++w) word = MaxWord<T>(word, raw[u].word[w]);
  }
  if constexpr (sizeof(T) == 4) return __uint_as_float(word);
  RawVec<T, 4> pair = {{word, word}};
  float x[4];
  ToFloat(pair, x);
  return fmaxf(x[0], x[1]);
}

// max and sum(exp((x - max) * scale)) of unscaled logits x, and sum(x).
struct RowState {
  float max, exp_sum, sum;

  template <typename T, int kN, int kCount>
  __device__ __forceinline__ void Add(const RawVec<T, kN> (&raw)[kCount], float scale,
                                      bool with_sum) {
    Raise(MaxOf(raw), scale);
    const float reference = Reference();
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      float x[kN], part[2] = {0.0f, 0.0f};
      ToFloat(raw[u], x);
#pragma unroll
      for (int i = 0; i < kN; ++i) part[i % 2] += __expf((x[i] - reference) * scale);
      exp_sum += part[0] + part[1];
      if (!with_sum) continue;
#pragma unroll
      for (int i = 0; i < kN; ++i) sum += x[i];
    }
  }

  __device__ __forceinline__ void Add(float x, float scale) {
    Raise(x, scale);
    exp_sum += __expf((x - Reference()) * scale);
    sum += x;
  }

  // Of the warp's threads, in all of them.
  __device__ __forceinline__ RowState CombineWarp(float scale) const {
    RowState all = {max, 0.0f, WarpSum(sum)};
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
      all.max = fmaxf(all.max, __shfl_xor_sync(0xFFFFFFFFu, all.max, mask));
    }
    all.exp_sum = WarpSum(exp_sum * __expf((max - all.Reference()) * scale));
    return all;
  }

  // Of the CTA's threads, in all of them. `shared`: 32 states, free again after the CTA's next
  // barrier.
  __device__ __forceinline__ RowState CombineCta(float scale, RowState* shared) const {
    const RowState of_warp = CombineWarp(scale);
    const int warps = static_cast<int>(blockDim.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    if (warps == 1) {
      __syncwarp();  // what was read before is not overwritten sooner by another thread
      return of_warp;
    }
    if (lane == 0) shared[threadIdx.x / 32] = of_warp;
    __syncthreads();
    RowState of_lane = {-INFINITY, 0.0f, 0.0f};
    if (lane < warps) of_lane = shared[lane];
    return of_lane.CombineWarp(scale);
  }

 private:
  __device__ __forceinline__ void Raise(float to, float scale) {
    if (to > max) {
      exp_sum *= __expf((max - to) * scale);
      max = to;
    }
  }

  // Where there is nothing but -inf any finite reference gives exp(-inf) = 0.
  __device__ __forceinline__ float Reference() const { return max == -INFINITY ? 0.0f : max; }
};

// The vectors of a row, in shared memory: copied there ahead of time, each by the thread that will
// use it.
template <typename T>
struct KeptRow {
  using Span = RowSpan<T>;
  typename Span::Vec* vecs;

  __device__ __forceinline__ void Copy(const Span& span, int v) const {
    if (v < span.vecs) AsyncCopy(vecs + v, span.Vecs(), static_cast<int64_t>(v) * Span::kN);
  }

  // All vectors of the thread from `first` on.
  __device__ __forceinline__ void CopyFrom(const Span& span, int first) const {
    for (int v = first; v < span.vecs; v += static_cast<int>(blockDim.x)) Copy(span, v);
    AsyncCommit();
  }
};

// Calls use(v, raw) for the thread's vectors of a row: raw[u] is number v + u * blockDim.x. All
// loads of a call are under way before the first is used. Returns the thread's first number past
// the row.
template <int kUnroll, typename T, typename Use>
__device__ __forceinline__ int ForEachVec(const RowSpan<T>& span,
                                          const typename RowSpan<T>::Vec* vecs, Use use) {
  using Vec = typename RowSpan<T>::Vec;
  const int threads = static_cast<int>(blockDim.x);
  int v = static_cast<int>(threadIdx.x);
  for (; v + (kUnroll - 1) * threads < span.vecs; v += kUnroll * threads) {
    Vec raw[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) raw[u] = vecs[v + u * threads];
    use(v, raw);
  }
  Vec raw[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (v + u * threads < span.vecs) raw[u] = vecs[v + u * threads];
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (v >= span.vecs) return v;
    const Vec one[1] = {raw[u]};
    use(v, one);
    v += threads;
  }
  return v;
}

// Reads a row's valid columns; kKeep: from `kept`.
template <int kUnroll, bool kKeep, typename T>
__device__ __forceinline__ RowState ReadRow(const RowSpan<T>& span, float scale, bool with_sum,
                                            const KeptRow<T>& kept) {
  RowState state = {-INFINITY, 0.0f, 0.0f};
  if constexpr (kKeep) AsyncWait(0);
  ForEachVec<kUnroll>(span, kKeep ? kept.vecs : span.Vecs(),
                      [&](int, const auto& raw) { state.Add(raw, scale, with_sum); });
  if (const int64_t i = span.Loose(); i >= 0) {
    state.Add(LoadScalar(span.first, kDTypeOf<T>, i), scale);
  }
  return state;
}

template <typename T>
__device__ __forceinline__ void Fill(T* first, int64_t size, float value) {
  constexpr int kN = RowSpan<T>::kN;
  if (size <= 0) return;
  const RowSpan<T> span(first, size);
  float values[kN];
#pragma unroll
  for (int i = 0; i < kN; ++i) values[i] = value;
  for (int v = static_cast<int>(threadIdx.x); v < span.vecs; v += static_cast<int>(blockDim.x)) {
    StoreVec<T>(values, first, span.head + static_cast<int64_t>(v) * kN);
  }
  if (const int64_t i = span.Loose(); i >= 0) StoreScalar(value, first, kDTypeOf<T>, i);
}

// Writes the gradient of a row's valid columns. kKeep: they are in `kept`, and after a vector's use
// the one of `next` is copied there.
template <int kUnroll, bool kKeep, typename T>
__device__ __forceinline__ void WriteGradient(const RowSpan<T>& span, T* out, float scale,
                                              const RowGradient& g, int64_t label_col,
                                              const KeptRow<T>& kept, const RowSpan<T>& next) {
  constexpr int kN = RowSpan<T>::kN;
  const bool aligned = reinterpret_cast<uintptr_t>(out + span.head) % 16 == 0;
  const int label_vec = label_col < span.head ? -1 : static_cast<int>((label_col - span.head) / kN);
  const auto gradient = [&](float x) { return g.softmax * __expf(x * scale - g.lse) - g.smooth; };
  const auto write = [&](int v, const auto& raw) {
    constexpr int kCount = sizeof(raw) / sizeof(raw[0]);
#pragma unroll
    for (int u = 0; u < kCount; ++u, v += static_cast<int>(blockDim.x)) {
      float x[kN];
      ToFloat(raw[u], x);
#pragma unroll
      for (int i = 0; i < kN; ++i) x[i] = gradient(x[i]);
      const int64_t col = span.head + static_cast<int64_t>(v) * kN;
      if (v == label_vec) {
#pragma unroll
        for (int i = 0; i < kN; ++i) x[i] -= col + i == label_col ? g.label : 0.0f;
      }
      if (aligned) {
        StoreVec<T>(x, out, col);
      } else {
#pragma unroll
        for (int i = 0; i < kN; ++i) StoreScalar(x[i], out, kDTypeOf<T>, col + i);
      }
      if constexpr (kKeep) kept.Copy(next, v);
    }
  };
  const int end = ForEachVec<kUnroll>(span, kKeep ? kept.vecs : span.Vecs(), write);
  if constexpr (kKeep) kept.CopyFrom(next, end);
  if (const int64_t i = span.Loose(); i >= 0) {
    const float x = gradient(LoadScalar(span.first, kDTypeOf<T>, i));
    StoreScalar(x - (i == label_col ? g.label : 0.0f), out, kDTypeOf<T>, i);
  }
}

// What the kernel does with one row, by its turn i.
template <typename T, CrossEntropyPass kPass, bool kKeep, int kUnroll>
struct CrossEntropyRows {
  static constexpr bool kForward = kPass != CrossEntropyPass::kBackward;
  static constexpr bool kBackward = kPass != CrossEntropyPass::kForward;

  const CrossEntropyParams& p;
  int64_t valid_cols;
  KeptRow<T> kept;

  // Forward leaves the first rows in the cache, where backward starts; and starts itself with the
  // last rows, which a matrix product before it may have left there.
  __device__ __forceinline__ int64_t Row(int64_t i) const { return kForward ? p.rows - 1 - i : i; }

  // Empty for a row that is not read.
  __device__ __forceinline__ RowSpan<T> Span(int64_t i, const RowLabel& label) const {
    if (i >= p.rows || label.ignored) return RowSpan<T>();
    return RowSpan<T>(static_cast<const T*>(p.logits) + Row(i) * p.logits_row_stride, valid_cols);
  }

  __device__ __forceinline__ RowLabel Label(int64_t i) const {
    if (i >= p.rows) return {true, true, -1};
    return ReadLabel(p, Row(i), valid_cols);
  }

  // Writes a row's losses; its log-sum-exp is returned to all threads.
  __device__ __forceinline__ float ForwardRow(int64_t row, const RowSpan<T>& span,
                                              const RowLabel& label, RowState* shared) const {
    float lse = 0.0f, x_sum = 0.0f, x_label = 0.0f;
    if (label.col >= 0) x_label = p.logit_scale * LoadScalar(span.first, kDTypeOf<T>, label.col);
    if (p.known_lse != nullptr) {
      lse = p.known_lse[row];
    } else if (!label.ignored) {
      const bool with_sum = p.label_smoothing > 0.0f;
      const RowState state = ReadRow<kUnroll, kKeep>(span, p.logit_scale, with_sum, kept)
                                 .CombineCta(p.logit_scale, shared);
      lse = state.max * p.logit_scale + logf(state.exp_sum);
      x_sum = state.sum * p.logit_scale;
    }
    if (threadIdx.x != 0) return lse;
    const float loss = RowLoss(p, lse, x_label, x_sum);
    p.losses[row] = label.ignored ? 0.0f : label.valid ? loss : NAN;
    if (p.lse != nullptr) p.lse[row] = label.ignored ? 0.0f : lse;
    if (p.z_losses != nullptr) p.z_losses[row] = label.ignored ? 0.0f : RowZLoss(p, lse);
    return lse;
  }

  __device__ __forceinline__ void BackwardRow(int64_t row, const RowSpan<T>& span,
                                              const RowLabel& label, float lse,
                                              const RowSpan<T>& next) const {
    T* out = static_cast<T*>(p.dlogits) + row * p.dlogits_row_stride;
    if (label.ignored || !label.valid) {
      Fill(out, valid_cols, label.ignored ? 0.0f : NAN);
      if constexpr (kKeep) kept.CopyFrom(next, static_cast<int>(threadIdx.x));
    } else {
      const RowGradient g = MakeRowGradient(p, row, lse);
      WriteGradient<kUnroll, kKeep>(span, out, p.logit_scale, g, label.col, kept, next);
    }
    Fill(out + valid_cols, p.cols - valid_cols, 0.0f);
  }
};

// Dynamic shared memory: where kKeep, the vectors of a row.
template <typename T, CrossEntropyPass kPass, bool kKeep, int kUnroll, int kMaxThreads,
          int kMinCtas>
__global__ void __launch_bounds__(kMaxThreads, kMinCtas)
    cross_entropy_kernel(const __grid_constant__ CrossEntropyParams p) {
  using Rows = CrossEntropyRows<T, kPass, kKeep, kUnroll>;
  __shared__ RowState shared[2][32];
  extern __shared__ float4 dynamic_shared[];
  const Rows rows = {
      p, ValidCols(p), {reinterpret_cast<typename RowSpan<T>::Vec*>(dynamic_shared)}};
  int64_t i = blockIdx.x;
  RowLabel label = rows.Label(i);
  RowSpan<T> span = rows.Span(i, label);
  if constexpr (kKeep) rows.kept.CopyFrom(span, static_cast<int>(threadIdx.x));
  for (int buffer = 0; i < p.rows; buffer ^= 1) {
    const int64_t row = rows.Row(i), next_i = i + gridDim.x;
    const RowLabel next_label = rows.Label(next_i);
    const RowSpan<T> next = rows.Span(next_i, next_label);
    float lse = 0.0f;
    if constexpr (Rows::kForward) {
      lse = rows.ForwardRow(row, span, label, shared[buffer]);
    } else {
      lse = p.known_lse[row];
    }
    if constexpr (Rows::kBackward) rows.BackwardRow(row, span, label, lse, next);
    i = next_i, label = next_label, span = next;
  }
}

}  // namespace flashtrain
