// What the forward and the backward CPU kernels share: tiles of fp32 in registers and the
// first-level cache, and which keys a query sees.
//
// Sources that include this are compiled once per instruction set, so everything has internal
// linkage (see common/cpu_row.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "flashtrain/attention/attention.h"
#include "flashtrain/common/cpu_row.h"
#include "flashtrain/common/philox.h"

namespace flashtrain {
namespace {  // NOLINT: see above

constexpr double kExactLog2E = 1.44269504088896341, kExactLn2 = 0.693147180559945309;
constexpr float kLog2E = kExactLog2E;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t RoundUp(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kMicroRows = 6, kMicroVectors = 4;  // 24 of 32 registers accumulate
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kMicroRows = 6, kMicroVectors = 2;  // 12 of 16
#else
constexpr int kLanes = 4;
constexpr int kMicroRows = 6, kMicroVectors = 2;
#endif
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

// A matrix whose elements are read one by one, by any strides.
struct Elements {
  const float* data;
  int64_t row_stride, depth_stride;
};

// c[r, j] (+)= sum over k < depth of a(r, k) * b[k, j], for ROWS rows and VECTORS * kLanes columns.
template <int ROWS, int VECTORS>
inline __attribute__((always_inline)) void MicroTile(Elements a, const float* b, int64_t b_stride,
                                                     int64_t depth, float* c, int64_t c_stride,
                                                     bool accumulate) {
  Vector sum[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r) {
    for (int j = 0; j < VECTORS; ++j) {
      sum[r][j] =
          accumulate ? *reinterpret_cast<const Vector*>(c + r * c_stride + j * kLanes) : Vector{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector row[VECTORS];
    for (int j = 0; j < VECTORS; ++j) {
      row[j] = *reinterpret_cast<const Vector*>(b + k * b_stride + j * kLanes);
    }
    for (int r = 0; r < ROWS; ++r) {
      const float factor = a.data[r * a.row_stride + k * a.depth_stride];
      for (int j = 0; j < VECTORS; ++j) sum[r][j] += factor * row[j];
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int j = 0; j < VECTORS; ++j) {
      *reinterpret_cast<Vector*>(c + r * c_stride + j * kLanes) = sum[r][j];
    }
  }
}

template <int VECTORS>
void MultiplyColumns(Elements a, const float* b, int64_t b_stride, int64_t rows, int64_t depth,
                     float* c, int64_t c_stride, bool accumulate) {
  int64_t r = 0;
  const auto rest = [&](int64_t row) {
    return Elements{a.data + row * a.row_stride, a.row_stride, a.depth_stride};
  };
  for (; r + kMicroRows <= rows; r += kMicroRows) {
    MicroTile<kMicroRows, VECTORS>(rest(r), b, b_stride, depth, c + r * c_stride, c_stride,
                                   accumulate);
  }
  for (; r + 2 <= rows; r += 2) {
    MicroTile<2, VECTORS>(rest(r), b, b_stride, depth, c + r * c_stride, c_stride, accumulate);
  }
  if (r < rows) {
    MicroTile<1, VECTORS>(rest(r), b, b_stride, depth, c + r * c_stride, c_stride, accumulate);
  }
}

// c [rows, columns] (+)= a [rows, depth] b [depth, columns]; columns is a multiple of kLanes.
inline void Multiply(Elements a, const float* b, int64_t b_stride, int64_t rows, int64_t columns,
                     int64_t depth, float* c, int64_t c_stride, bool accumulate) {
  int64_t j = 0;
  for (; j + kMicroVectors * kLanes <= columns; j += kMicroVectors * kLanes) {
    MultiplyColumns<kMicroVectors>(a, b + j, b_stride, rows, depth, c + j, c_stride, accumulate);
  }
  for (; j < columns; j += kLanes) {
    MultiplyColumns<1>(a, b + j, b_stride, rows, depth, c + j, c_stride, accumulate);
  }
}

// 2^x to 2 ulp, 0 below 2^-126; NaN stays NaN. Branchless, so that loops over it vectorise.
// x = n + f, f in [-0.5, 0.5]; 2^f by its Taylor polynomial (remainder 1.2e-7 at most); n goes into
// the exponent.
inline __attribute__((always_inline)) float Exp2(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves n in the low mantissa bits
  float clamped = x < -126.0f ? -126.0f : x;
  clamped = clamped > 128.0f ? 128.0f : clamped;
  const float shifted = clamped + kRound;
  const float f = clamped - (shifted - kRound);
  float p = 1.5403530393381609e-4f;
  p = p * f + 1.3333558146428443e-3f;
  p = p * f + 9.6181291076284772e-3f;
  p = p * f + 5.5504108664821580e-2f;
  p = p * f + 2.4022650695910072e-1f;
  p = p * f + 6.9314718055994531e-1f;
  p = p * f + 1.0f;
  const uint32_t exponent = BitCast<uint32_t>(shifted) << 23;
  float result = BitCast<float>(BitCast<uint32_t>(p) + exponent);
  result = x < -126.0f ? 0.0f : result;
  return x != x ? x : result;
}

// tanh(x) = 1 - 2 / (e^2x + 1)
inline __attribute__((always_inline)) float Tanh(float x) {
  return 1.0f - 2.0f / (Exp2(x * (2.0f * kLog2E)) + 1.0f);
}

// One sequence of a problem.
struct Sequence {
  int64_t index;
  int64_t q_row, k_row;  // first rows in the whole of q and of k
  int64_t seqlen_q, seqlen_k;
  bool varlen;

  Sequence(const AttentionParams& p, int64_t b) : index(b), varlen(p.cu_seqlens_q != nullptr) {
    q_row = varlen ? p.cu_seqlens_q[b] : b * p.max_seqlen_q;
    k_row = varlen ? p.cu_seqlens_k[b] : b * p.max_seqlen_k;
    seqlen_q = varlen ? p.cu_seqlens_q[b + 1] - q_row : p.max_seqlen_q;
    seqlen_k = varlen ? p.cu_seqlens_k[b + 1] - k_row : p.max_seqlen_k;
  }

  int64_t shift() const { return seqlen_k - seqlen_q; }

  // Element offset of this sequence's row `row` of a head; start is q_row or k_row.
  int64_t Offset(const AttentionTensor& t, int64_t start, int64_t row, int64_t head) const {
    const int64_t first = varlen ? start * t.row_stride : index * t.batch_stride;
    return first + row * t.row_stride + head * t.head_stride;
  }

  float* Lse(const AttentionParams& p, int64_t head) const {
    return p.lse + head * p.lse_head_stride + (varlen ? q_row : index * p.lse_batch_stride);
  }
};

inline float AlibiSlope(const AttentionParams& p, const Sequence& s, int64_t head) {
  return p.alibi_slopes == nullptr ? 0.0f : p.alibi_slopes[s.index * p.alibi_batch_stride + head];
}

// The keys that at least one of the queries [begin, end) sees, and those that all see.
struct KeyRange {
  int64_t begin, end, full_begin, full_end;

  KeyRange(const AttentionParams& p, const Sequence& s, int64_t q_begin, int64_t q_end) {
    const int64_t first = q_begin + s.shift(), last = q_end - 1 + s.shift();
    begin = full_begin = 0;
    end = full_end = s.seqlen_k;
    if (p.window_left >= 0) {
      begin = Max(0, first - p.window_left);
      full_begin = Max(0, last - p.window_left);
    }
    if (p.window_right >= 0) {
      end = Min(end, Max(0, last + p.window_right + 1));
      full_end = Min(end, Max(0, first + p.window_right + 1));
    }
  }
};

inline bool Sees(const AttentionParams& p, int64_t position, int64_t key) {
  return (p.window_left < 0 || key >= position - p.window_left) &&
         (p.window_right < 0 || key <= position + p.window_right);
}

// rows x cols of fp32 [*, stride]; zeros after the last column up to `stride`.
inline void LoadRows(const AttentionTensor& t, DType dtype, int64_t offset, int64_t rows,
                     int64_t cols, float* dst, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row) {
    float* to = dst + row * stride;
    const float* loaded = LoadFloat(t.data, dtype, offset + row * t.row_stride, cols, to);
    if (loaded != to) std::memcpy(to, loaded, cols * sizeof(float));
    for (int64_t col = cols; col < stride; ++col) to[col] = 0.0f;
  }
}

// dst [cols, stride] = transpose of src [rows, src_stride]; zeros after the last row up to
// `stride`.
inline void Transpose(const float* src, int64_t src_stride, int64_t rows, int64_t cols, float* dst,
                      int64_t stride) {
  for (int64_t col = 0; col < cols; ++col) {
    float* to = dst + col * stride;
    for (int64_t row = 0; row < rows; ++row) to[row] = src[row * src_stride + col];
    for (int64_t row = rows; row < stride; ++row) to[row] = 0.0f;
  }
}

}  // namespace
}  // namespace flashtrain
