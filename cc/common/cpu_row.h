// Row operations of CPU kernels: conversion to and from fp32, and fp32 sums, in plain loops that
// the compiler vectorises.
//
// Sources that include this are compiled once per instruction set (see cpu_isa.h), so every
// function has internal linkage: a copy compiled for AVX-512 must never be linked into code for
// older CPUs.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "flashtrain/common/dtype.h"
#include "flashtrain/common/philox.h"

namespace flashtrain {
namespace {  // NOLINT: see above

template <typename To, typename From>
inline To BitCast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float BFloat16ToFloat(uint16_t h) { return BitCast<float>(static_cast<uint32_t>(h) << 16); }

// Round to nearest even; NaN stays NaN.
inline uint16_t FloatToBFloat16(float f) {
  const uint32_t bits = BitCast<uint32_t>(f);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded);
}

// Exponent and mantissa move to their fp32 places; multiplying by 2^112 then rebiases the exponent
// and normalises subnormals exactly.
inline float HalfToFloat(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7FFFu) << 13;
  const float scaled = BitCast<float>(magnitude) * BitCast<float>(0x77800000u);
  const bool is_inf_nan = (h & 0x7C00u) == 0x7C00u;
  const uint32_t bits = is_inf_nan ? magnitude | 0x7F800000u : BitCast<uint32_t>(scaled);
  return BitCast<float>(bits | sign);
}

// Round to nearest even, overflow to inf; NaN stays NaN.
inline uint16_t FloatToHalf(float f) {
  const uint32_t bits = BitCast<uint32_t>(f);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  // Normal results: rebias the exponent and round at bit 13.
  const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 leaves value / 2^-24, rounded, in the low mantissa bits.
  const uint32_t subnormal =
      BitCast<uint32_t>(BitCast<float>(magnitude) + 0.5f) - BitCast<uint32_t>(0.5f);
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477FF000u ? 0x7C00u : half;
  half = magnitude > 0x7F800000u ? 0x7E00u : half;
  return static_cast<uint16_t>(half | sign);
}

inline void HalfToFloatRow(const uint16_t* src, int64_t n, float* dst) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i));
    _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(h));
  }
#endif
  for (; i < n; ++i) dst[i] = HalfToFloat(src[i]);
}

inline void FloatToHalfRow(const float* src, int64_t n, uint16_t* dst) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i), h);
  }
#endif
  for (; i < n; ++i) dst[i] = FloatToHalf(src[i]);
}

// Elements [offset, offset + n) of a tensor as fp32: the tensor's own memory where it is fp32 (no
// copy), else `buffer`, filled.
inline const float* LoadFloat(const void* base, DType dtype, int64_t offset, int64_t n,
                              float* __restrict__ buffer) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(base) + offset;
  const uint16_t* __restrict__ src = static_cast<const uint16_t*>(base) + offset;
  if (dtype == DType::kFloat16) {
    HalfToFloatRow(src, n, buffer);
  } else {
    for (int64_t i = 0; i < n; ++i) buffer[i] = BFloat16ToFloat(src[i]);
  }
  return buffer;
}

inline float LoadFloat1(const void* base, DType dtype, int64_t offset) {
  float value;
  return *LoadFloat(base, dtype, offset, 1, &value);
}

// Rounds n fp32 values into elements [offset, offset + n) of a tensor.
inline void StoreFloat(const float* __restrict__ src, int64_t n, void* base, DType dtype,
                       int64_t offset) {
  if (dtype == DType::kFloat32) {
    std::memcpy(static_cast<float*>(base) + offset, src, n * sizeof(float));
    return;
  }
  uint16_t* __restrict__ dst = static_cast<uint16_t*>(base) + offset;
  if (dtype == DType::kFloat16) {
    FloatToHalfRow(src, n, dst);
  } else {
    for (int64_t i = 0; i < n; ++i) dst[i] = FloatToBFloat16(src[i]);
  }
}

// Rounds n fp32 values in place to values that the dtype holds.
inline void RoundRow(DType dtype, int64_t n, float* __restrict__ x) {
  if (dtype == DType::kFloat32) return;
  constexpr int64_t kChunk = 256;
  uint16_t rounded[kChunk];
  for (int64_t i = 0; i < n; i += kChunk) {
    const int64_t size = n - i < kChunk ? n - i : kChunk;
    StoreFloat(x + i, size, rounded, dtype, 0);
    LoadFloat(rounded, dtype, 0, size, x + i);
  }
}

// A running fp32 sum kept in independent lanes, in a fixed order. The lanes are a vector of the
// compiler's, which splits it to what the CPU has: it leaves an array's sums in single floats.
struct LaneSum {
  static constexpr int kLanes = 32;
  typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
  Lanes lanes = {};

  // Adds f(0) + ... + f(n - 1).
  template <typename F>
  inline __attribute__((always_inline)) void Add(int64_t n, F f) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      Lanes values;
      for (int l = 0; l < kLanes; ++l) values[l] = f(i + l);
      lanes += values;
    }
    if (i == n) return;
    float rest[kLanes] = {};
    for (int l = 0; i < n; ++i, ++l) rest[l] = f(i);
    Lanes values;
    std::memcpy(&values, rest, sizeof(values));
    lanes += values;
  }

  float Total() const {
    float sum[kLanes];
    std::memcpy(sum, &lanes, sizeof(sum));
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int l = 0; l < width; ++l) sum[l] += sum[l + width];
    }
    return sum[0];
  }
};

// Dropout factors of columns [col, col + n) of a row: `scale` where kept, 0 where dropped.
// col must be a multiple of 4 and `keep` hold n rounded up to a multiple of 64.
inline void DropoutRow(const uint64_t* rng_state, float p, float scale, int64_t row, int64_t col,
                       int64_t n, float* __restrict__ keep) {
  constexpr int kGroups = 16;  // Philox blocks at once, one per vector lane
  const uint32_t threshold = DropoutThreshold(p);
  const uint64_t seed = rng_state[0], offset = rng_state[1];
  for (int64_t i = 0; i < n; i += 4 * kGroups) {
    const uint32_t first = static_cast<uint32_t>((col + i) / 4);
    for (int g = 0; g < kGroups; ++g) {
      const Philox4 random = PhiloxBlock(seed, offset, row, first + g);
      for (int w = 0; w < 4; ++w) {
        keep[i + 4 * g + w] = random.word[w] >= threshold ? scale : 0.0f;
      }
    }
  }
}

}  // namespace
}  // namespace flashtrain
