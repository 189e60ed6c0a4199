// One thread's share of the CPU path. Compiled once per instruction set: FLASHTRAIN_CPU_ISA_NAME is
// Baseline, V3 or V4. Rows are handled in blocks of columns that stay in the first-level cache;
// dtypes are run-time, since a block's conversion costs little beside its exponentials.
#include <cmath>
#include <cstdint>
#include <limits>

#include "flashtrain/common/cpu_row.h"
#include "flashtrain/cross_entropy/cross_entropy_cpu.h"
#include "flashtrain/cross_entropy/cross_entropy_row.h"

namespace flashtrain {
namespace {

constexpr int64_t kBlock = 1024;  // columns
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }

// exp(x) to 2 units in the last place; below -87.3, where it would be subnormal, 0. NaN stays NaN.
// x = n * ln 2 + r with |r| <= ln 2 / 2; exp(r) by the polynomial of Cephes' expf (degree 7); 2^n
// by its bits. Adding 1.5 * 2^23 rounds to an integer, which the low bits of the sum then hold.
inline float Exp(float x) {
  constexpr float kMax = 88.7f, kMin = -87.3f, kRound = 12582912.0f;
  const float clamped = x > kMax ? kMax : x < kMin ? kMin : x;
  const float shifted = clamped * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  // Halved and doubled, so that n = 128 does not overflow the exponent's bits. Unsigned: NaN's do.
  const uint32_t exponent = (BitCast<uint32_t>(shifted) - BitCast<uint32_t>(kRound) + 126u) << 23;
  const float result = 2.0f * (y * BitCast<float>(exponent));
  return x < kMin ? 0.0f : result;
}

// The largest of n values; NaN counts as none.
inline float MaxOf(const float* __restrict__ x, int64_t n) {
  constexpr int kLanes = 32;
  float lane[kLanes];
  for (float& value : lane) value = -kInfinity;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l];
  }
  for (int l = 0; i < n; ++i, ++l) lane[l] = x[i] > lane[l] ? x[i] : lane[l];
  float largest = lane[0];
  for (const float value : lane) largest = value > largest ? value : largest;
  return largest;
}

struct RowSums {
  float lse, x_sum;
};

// One pass over a row's valid columns, the sum of exponentials kept relative to the running
// maximum.
RowSums SumRow(const CrossEntropyParams& p, int64_t row, int64_t valid_cols) {
  float max = -kInfinity, exp_sum = 0.0f;  // of the unscaled logits; relative to max
  LaneSum sum;
  for (int64_t col = 0; col < valid_cols; col += kBlock) {
    const int64_t n = Min(kBlock, valid_cols - col);
    float buffer[kBlock], exps[kBlock];
    const float* __restrict__ x =
        LoadFloat(p.logits, p.dtype, row * p.logits_row_stride + col, n, buffer);
    const float block_max = MaxOf(x, n);
    if (block_max > max) {
      exp_sum *= Exp((max - block_max) * p.logit_scale);
      max = block_max;
    }
    // Nothing but -inf so far: any finite reference gives exp(-inf) = 0.
    const float reference = max == -kInfinity ? 0.0f : max;
    const float scale = p.logit_scale;
    for (int64_t i = 0; i < n; ++i) exps[i] = Exp((x[i] - reference) * scale);
    LaneSum block_sum;
    block_sum.Add(n, [&exps](int64_t i) { return exps[i]; });
    exp_sum += block_sum.Total();
    if (p.label_smoothing > 0.0f) sum.Add(n, [x](int64_t i) { return x[i]; });
  }
  return {max * p.logit_scale + std::log(exp_sum), sum.Total() * p.logit_scale};
}

void ForwardRow(const CrossEntropyParams& p, int64_t row, int64_t valid_cols, const RowLabel& label,
                float* lse) {
  float x_label = 0.0f;
  if (label.col >= 0) {
    x_label = p.logit_scale * LoadFloat1(p.logits, p.dtype, row * p.logits_row_stride + label.col);
  }
  RowSums sums = {0.0f, 0.0f};
  if (p.known_lse != nullptr) {
    sums.lse = p.known_lse[row];
  } else {
    sums = SumRow(p, row, valid_cols);
  }
  *lse = sums.lse;
  p.losses[row] = RowLoss(p, sums.lse, x_label, sums.x_sum);
  if (p.lse != nullptr) p.lse[row] = sums.lse;
  if (p.z_losses != nullptr) p.z_losses[row] = RowZLoss(p, sums.lse);
}

// dlogits may be logits: a block is read as a whole before it is written.
void BackwardRow(const CrossEntropyParams& p, int64_t row, int64_t valid_cols,
                 const RowLabel& label, float lse) {
  const RowGradient g = MakeRowGradient(p, row, lse);
  for (int64_t col = 0; col < p.cols; col += kBlock) {
    const int64_t n = Min(kBlock, p.cols - col);
    float buffer[kBlock], gradient[kBlock] = {};
    const int64_t valid = Min(n, valid_cols - col);
    if (!label.ignored && valid > 0) {
      const float* __restrict__ x =
          LoadFloat(p.logits, p.dtype, row * p.logits_row_stride + col, valid, buffer);
      const float scale = p.logit_scale;
      for (int64_t i = 0; i < valid; ++i) {
        gradient[i] = g.softmax * Exp(x[i] * scale - g.lse) - g.smooth;
      }
      if (label.col >= col && label.col < col + valid) gradient[label.col - col] -= g.label;
    }
    StoreFloat(gradient, n, p.dlogits, p.dtype, row * p.dlogits_row_stride + col);
  }
}

void Rows(const CrossEntropyParams& p, CrossEntropyPass pass, int64_t begin, int64_t end) {
  const int64_t valid_cols = ValidCols(p);
  for (int64_t row = begin; row < end; ++row) {
    const RowLabel label = ReadLabel(p, row, valid_cols);
    float lse = 0.0f;
    if (pass == CrossEntropyPass::kBackward) {
      lse = p.known_lse[row];
    } else if (label.ignored) {
      p.losses[row] = 0.0f;
      if (p.lse != nullptr) p.lse[row] = 0.0f;
      if (p.z_losses != nullptr) p.z_losses[row] = 0.0f;
    } else {
      ForwardRow(p, row, valid_cols, label, &lse);
    }
    if (pass != CrossEntropyPass::kForward) BackwardRow(p, row, valid_cols, label, lse);
  }
}

}  // namespace

#define FLASHTRAIN_CONCAT_(a, b) a##b
#define FLASHTRAIN_CONCAT(a, b) FLASHTRAIN_CONCAT_(a, b)
const CrossEntropyCpuKernels FLASHTRAIN_CONCAT(kCrossEntropyCpuKernels,
                                               FLASHTRAIN_CPU_ISA_NAME) = {Rows};

}  // namespace flashtrain
