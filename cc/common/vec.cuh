// Short vectors: 8- and 16-byte accesses, and conversion to and from fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "flashtrain/common/dtype.h"

namespace flashtrain {

// N elements of T as they lie in memory; N * sizeof(T) is 8 or 16.
template <typename T, int N>
struct alignas(N * sizeof(T)) RawVec {
  uint32_t word[N * sizeof(T) / 4];
};

template <typename T, int N>
__device__ __forceinline__ void ToFloat(const RawVec<T, N>& v, float (&out)[N]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = __uint_as_float(v.word[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      float2 pair;
      if constexpr (std::is_same_v<T, __half>) {
        __half2 half;
        memcpy(&half, &v.word[i], sizeof(half));
        pair = __half22float2(half);
      } else {
        // bf16 is the upper half of an fp32.
        pair.x = __uint_as_float(v.word[i] << 16);
        pair.y = __uint_as_float(v.word[i] & 0xFFFF0000u);
      }
      out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
    }
  }
}

// Elements [index, index + N) of a small tensor that many rows share, as fp32, through L1.
template <int N>
__device__ __forceinline__ void LoadShared(const void* base, DType dtype, int64_t index,
                                           float (&out)[N]) {
  if (dtype == DType::kFloat32) {
    const float4* ptr = reinterpret_cast<const float4*>(static_cast<const float*>(base) + index);
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const float4 v = __ldg(ptr + i);
      out[4 * i] = v.x, out[4 * i + 1] = v.y, out[4 * i + 2] = v.z, out[4 * i + 3] = v.w;
    }
    return;
  }
  uint32_t word[N / 2];
  const char* ptr = static_cast<const char*>(base) + 2 * index;
  if constexpr (N == 8) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(ptr));
    word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
  } else {
    static_assert(N == 4, "4 or 8 elements");
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(ptr));
    word[0] = v.x, word[1] = v.y;
  }
  if (dtype == DType::kFloat16) {
    RawVec<__half, N> raw;
    memcpy(raw.word, word, sizeof(word));
    ToFloat(raw, out);
  } else {
    RawVec<__nv_bfloat16, N> raw;
    memcpy(raw.word, word, sizeof(word));
    ToFloat(raw, out);
  }
}

// Rounds N fp32 values into elements [index, index + N) of an aligned tensor.
template <int N>
__device__ __forceinline__ void StoreVec(const float (&in)[N], void* base, DType dtype,
                                         int64_t index) {
  if (dtype == DType::kFloat32) {
    float4* ptr = reinterpret_cast<float4*>(static_cast<float*>(base) + index);
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      ptr[i] = make_float4(in[4 * i], in[4 * i + 1], in[4 * i + 2], in[4 * i + 3]);
    }
    return;
  }
  uint32_t word[N / 2];
  if (dtype == DType::kFloat16) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const __half2 pair = __floats2half2_rn(in[2 * i], in[2 * i + 1]);
      memcpy(&word[i], &pair, sizeof(pair));
    }
  } else {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(in[2 * i], in[2 * i + 1]);
      memcpy(&word[i], &pair, sizeof(pair));
    }
  }
  char* ptr = static_cast<char*>(base) + 2 * index;
  if constexpr (N == 8) {
    *reinterpret_cast<uint4*>(ptr) = make_uint4(word[0], word[1], word[2], word[3]);
  } else {
    static_assert(N == 4, "4 or 8 elements");
    *reinterpret_cast<uint2*>(ptr) = make_uint2(word[0], word[1]);
  }
}

// One element of any dtype, for code that is not worth specialising.
__device__ __forceinline__ float LoadScalar(const void* base, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(base)[index];
    case DType::kFloat16:
      return __half2float(static_cast<const __half*>(base)[index]);
    default:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(base)[index]);
  }
}

__device__ __forceinline__ void StoreScalar(float value, void* base, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat32:
      static_cast<float*>(base)[index] = value;
      break;
    case DType::kFloat16:
      static_cast<__half*>(base)[index] = __float2half_rn(value);
      break;
    default:
      static_cast<__nv_bfloat16*>(base)[index] = __float2bfloat16_rn(value);
      break;
  }
}

}  // namespace flashtrain
