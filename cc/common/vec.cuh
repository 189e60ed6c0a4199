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

template <typename T, int N>
__device__ __forceinline__ RawVec<T, N> FromFloat(const float (&in)[N]) {
  RawVec<T, N> v;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i) v.word[i] = __float_as_uint(in[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      if constexpr (std::is_same_v<T, __half>) {
        const __half2 pair = __floats2half2_rn(in[2 * i], in[2 * i + 1]);
        memcpy(&v.word[i], &pair, sizeof(pair));
      } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(in[2 * i], in[2 * i + 1]);
        memcpy(&v.word[i], &pair, sizeof(pair));
      }
    }
  }
  return v;
}

// Rounds N fp32 values into elements [index, index + N) of an aligned tensor of T.
template <typename T, int N>
__device__ __forceinline__ void StoreVec(const float (&in)[N], void* base, int64_t index) {
  T* ptr = static_cast<T*>(base) + index;
  if constexpr (N * sizeof(T) <= 16) {
    *reinterpret_cast<RawVec<T, N>*>(ptr) = FromFloat<T>(in);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      *reinterpret_cast<float4*>(ptr + i) = make_float4(in[i], in[i + 1], in[i + 2], in[i + 3]);
    }
  }
}

// The same for a dtype known at run time.
template <int N>
__device__ __forceinline__ void StoreVec(const float (&in)[N], void* base, DType dtype,
                                         int64_t index) {
  switch (dtype) {
    case DType::kFloat32:
      StoreVec<float>(in, base, index);
      break;
    case DType::kFloat16:
      StoreVec<__half>(in, base, index);
      break;
    default:
      StoreVec<__nv_bfloat16>(in, base, index);
      break;
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

// Elements [index, index + 4), of any alignment.
__device__ __forceinline__ float4 LoadScalar4(const void* base, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat32: {
      const float* v = static_cast<const float*>(base) + index;
      return make_float4(v[0], v[1], v[2], v[3]);
    }
    case DType::kFloat16: {
      const __half* v = static_cast<const __half*>(base) + index;
      return make_float4(__half2float(v[0]), __half2float(v[1]), __half2float(v[2]),
                         __half2float(v[3]));
    }
    default: {
      const __nv_bfloat16* v = static_cast<const __nv_bfloat16*>(base) + index;
      return make_float4(__bfloat162float(v[0]), __bfloat162float(v[1]), __bfloat162float(v[2]),
                         __bfloat162float(v[3]));
    }
  }
}

// The nearest fp32 value that the dtype holds.
__device__ __forceinline__ float RoundTo(DType dtype, float value) {
  switch (dtype) {
    case DType::kFloat32:
      return value;
    case DType::kFloat16:
      return __half2float(__float2half_rn(value));
    default:
      return __bfloat162float(__float2bfloat16_rn(value));
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
