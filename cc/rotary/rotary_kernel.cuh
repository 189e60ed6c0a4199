// The CUDA kernel of rotary.h.
//
// Layout. A thread takes one token, one slice of columns and up to kHeads heads of one part, so
// that it reads its cosines and sines once for all of them: read anew for each head, in fp32, they
// would be as much traffic as the heads themselves, if only from the caches. A slice is kN pairs:
// two vectors of kN elements, `lo` and `hi`, half a rotary_dim apart or, interleaved, adjacent.
// Slices past rotary_dim are copied. Neighbouring threads take neighbouring slices, then
// neighbouring heads; a thread's own heads are far apart.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "flashtrain/common/vec.cuh"
#include "flashtrain/rotary/rotary_cuda.h"
#include "flashtrain/rotary/rotary_position.h"

namespace flashtrain {

// kN elements of T as they lie in memory, moved in one access, for which they must be aligned.
template <typename T, int kN>
struct Slice {
  using Memory = std::conditional_t<kN == 1, T, RawVec<T, kN>>;
  Memory memory;

  __device__ __forceinline__ void Load(const T* from) {
    memory = *reinterpret_cast<const Memory*>(from);
  }
  __device__ __forceinline__ void Store(T* to) const { *reinterpret_cast<Memory*>(to) = memory; }

  __device__ __forceinline__ void Get(float (&out)[kN]) const {
    if constexpr (kN == 1) {
      out[0] = static_cast<float>(memory);
    } else {
      ToFloat(memory, out);
    }
  }
  __device__ __forceinline__ void Set(const float (&in)[kN]) {
    if constexpr (kN == 1) {
      memory = static_cast<T>(in[0]);
    } else {
      memory = FromFloat<T>(in);
    }
  }
};

// kN elements of a table.
template <typename T, int kN>
__device__ __forceinline__ void LoadTable(const RotaryParams& p, const void* table, int64_t index,
                                          float (&out)[kN]) {
  if (p.table_dtype != DType::kFloat32) {
    Slice<T, kN> slice;
    slice.Load(static_cast<const T*>(table) + index);
    slice.Get(out);
    return;
  }
  constexpr int kStep = kN < 4 ? kN : 4;
#pragma unroll
  for (int i = 0; i < kN; i += kStep) {
    Slice<float, kStep> slice;
    slice.Load(static_cast<const float*>(table) + index + i);
    float part[kStep];
    slice.Get(part);
#pragma unroll
    for (int j = 0; j < kStep; ++j) out[i + j] = part[j];
  }
}

// Turns kN pairs that lie in two vectors as the style has it.
template <typename T, int kN>
__device__ __forceinline__ void RotatePairs(bool interleaved, const float (&cos)[kN],
                                            const float (&sin)[kN], Slice<T, kN>& lo_slice,
                                            Slice<T, kN>& hi_slice) {
  float lo[kN], hi[kN];
  lo_slice.Get(lo), hi_slice.Get(hi);
  const auto rotate = [](float c, float s, float& a, float& b) {
    const float turned = a * c - b * s;
    b = b * c + a * s;
    a = turned;
  };
  if (!interleaved || kN == 1) {
#pragma unroll
    for (int i = 0; i < kN; ++i) rotate(cos[i], sin[i], lo[i], hi[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      rotate(cos[i], sin[i], lo[2 * i], lo[2 * i + 1]);
      rotate(cos[kN / 2 + i], sin[kN / 2 + i], hi[2 * i], hi[2 * i + 1]);
    }
  }
  lo_slice.Set(lo), hi_slice.Set(hi);
}

// Where a thread's slice lies in a head, and what is done with it.
struct SliceColumns {
  int64_t lo, hi;  // columns; hi < 0: there is none
  bool rotate;
};

template <int kN>
__device__ __forceinline__ SliceColumns FindColumns(const RotaryParams& p, int index) {
  const int64_t half = p.rotary_dim / 2, pair = static_cast<int64_t>(index) * kN;
  if (pair < half) {
    return p.interleaved ? SliceColumns{2 * pair, 2 * pair + kN, true}
                         : SliceColumns{pair, pair + half, true};
  }
  const int64_t lo = 2 * pair, hi = lo + kN;  // half is a multiple of kN
  return {lo, hi < p.head_dim ? hi : -1, false};
}

// The cosines and sines of a slice; NaN for a token outside the tables. False: the token is copied.
template <typename T, int kN>
__device__ __forceinline__ bool LoadAngles(const RotaryParams& p, const RotaryPart& part,
                                           int64_t batch, int64_t token, int slice,
                                           float (&cos)[kN], float (&sin)[kN]) {
  const RotaryPosition at = FindRotaryPosition(p, batch, token);
  if (at.token == RotaryToken::kRotate) {
    const int64_t index = at.position * p.table_row_stride + static_cast<int64_t>(slice) * kN;
    LoadTable<T>(p, part.cos, index, cos);
    LoadTable<T>(p, part.sin, index, sin);
  } else {
#pragma unroll
    for (int i = 0; i < kN; ++i) cos[i] = sin[i] = NAN;
  }
  if (p.conjugate) {
#pragma unroll
    for (int i = 0; i < kN; ++i) sin[i] = -sin[i];
  }
  return at.token != RotaryToken::kCopy;
}

// row / seqlen; a division of 64 bits takes several times as long as one of 32.
__device__ __forceinline__ int64_t DivideRow(int64_t row, int64_t seqlen) {
  if ((row | seqlen) >> 32 != 0) return row / seqlen;
  return static_cast<uint32_t>(row) / static_cast<uint32_t>(seqlen);
}

template <typename T, int kN, int kHeads>
__global__ void __launch_bounds__(RotaryTile::kMaxThreads)
    rotary_kernel(const __grid_constant__ RotaryParams p, const __grid_constant__ RotaryTile tile) {
  // Which token, slice, part and first head.
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z;
  const int slice_index = static_cast<int>(blockIdx.z * blockDim.x + threadIdx.x);
  int first_head = static_cast<int>(blockIdx.y * blockDim.y + threadIdx.y);
  if (row >= p.batch * p.seqlen || slice_index >= tile.slices || first_head >= tile.groups) return;
  const int64_t batch = DivideRow(row, p.seqlen), token = row - batch * p.seqlen;
  int index = 0;
  while (first_head >= tile.head_groups[index]) first_head -= tile.head_groups[index++];
  const RotaryPart& part = p.parts[index];
  const SliceColumns columns = FindColumns<kN>(p, slice_index);

  const T* x = static_cast<const T*>(part.x) + batch * part.x_batch_stride +
               token * part.x_seq_stride + first_head * part.x_head_stride;
  T* out = static_cast<T*>(part.out) + batch * part.out_batch_stride + token * part.out_seq_stride +
           first_head * part.out_head_stride;
  const int step = tile.head_groups[index];
  Slice<T, kN> lo[kHeads], hi[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (first_head + h * step >= part.heads) break;
    const T* head = x + h * step * part.x_head_stride;
    lo[h].Load(head + columns.lo);
    if (columns.hi >= 0) hi[h].Load(head + columns.hi);
  }
  float cos[kN], sin[kN];
  const bool rotate = columns.rotate && part.cos != nullptr &&
                      LoadAngles<T>(p, part, batch, token, slice_index, cos, sin);
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (first_head + h * step >= part.heads) break;
    if (rotate) RotatePairs(p.interleaved, cos, sin, lo[h], hi[h]);
    T* head = out + h * step * part.out_head_stride;
    lo[h].Store(head + columns.lo);
    if (columns.hi >= 0) hi[h].Store(head + columns.hi);
  }
}

}  // namespace flashtrain
