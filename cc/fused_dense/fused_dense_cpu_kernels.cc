// One thread's share of the CPU path. Compiled once per instruction set: FLASHTRAIN_CPU_ISA_NAME is
// Baseline, V3 or V4. Rows are handled in blocks of columns that stay in the first-level cache;
// dtypes are run-time, since a block's conversion costs little beside its memory traffic.
#include <cstdint>
#include <cstring>

#include "flashtrain/common/cpu_row.h"
#include "flashtrain/fused_dense/fused_dense_cpu.h"

namespace flashtrain {
namespace {

constexpr int64_t kBlock = 512;  // columns

inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }

// exp(x) to 2 units in the last place, in operations that vectorise: 2^n * e^r with |r| <= ln(2)/2
// and e^r by its Taylor series. Below -87.3 it gives 2^-126, above 88.4 infinity; NaN stays NaN.
inline float Exp(float x) {
  constexpr float kRound =
      12582912.0f;  // 1.5 * 2^23: adding it leaves the integer part in the bits
  x = x < -87.3f ? -87.3f : x;
  x = x > 88.8f ? 88.8f : x;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
  float e = 1.0f / 5040.0f;
  e = e * r + 1.0f / 720.0f;
  e = e * r + 1.0f / 120.0f;
  e = e * r + 1.0f / 24.0f;
  e = e * r + 1.0f / 6.0f;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  const uint32_t exponent = (BitCast<uint32_t>(shifted) - BitCast<uint32_t>(kRound) + 127u) << 23;
  return e * BitCast<float>(exponent);
}

constexpr float kGeluA = 1.5957691216f, kGeluB = 0.044715f;  // 2 sqrt(2/pi)

// exp(-2 u): sigmoid(2 u) = 1 / (1 + e).
inline float GeluExp(float x) { return Exp(-kGeluA * (x + kGeluB * x * x * x)); }

inline float Gelu(float x) { return x * (1.0f / (1.0f + GeluExp(x))); }

inline float GeluDerivative(float x) {
  const float e = GeluExp(x);
  const float s = 1.0f / (1.0f + e);
  const float t = s * (e > 3e38f ? 3e38f : e);  // 1 - s without cancellation; 0 where s is
  return s + x * s * t * (kGeluA * (1.0f + 3.0f * kGeluB * x * x));
}

// NaN is not <= 0 and stays.
inline float Relu(float x) { return x <= 0.0f ? 0.0f : x; }

void Activate(Activation activation, const float* __restrict__ x, int64_t n,
              float* __restrict__ out) {
  switch (activation) {
    case Activation::kIdentity:
      for (int64_t i = 0; i < n; ++i) out[i] = x[i];
      break;
    case Activation::kGeluApprox:
      for (int64_t i = 0; i < n; ++i) out[i] = Gelu(x[i]);
      break;
    case Activation::kRelu:
      for (int64_t i = 0; i < n; ++i) out[i] = Relu(x[i]);
      break;
    case Activation::kSquaredRelu:
      for (int64_t i = 0; i < n; ++i) out[i] = Relu(x[i]) * Relu(x[i]);
      break;
  }
}

void MultiplyByDerivative(Activation activation, const float* __restrict__ x, int64_t n,
                          float* __restrict__ grad) {
  switch (activation) {
    case Activation::kIdentity:
      break;
    case Activation::kGeluApprox:
      for (int64_t i = 0; i < n; ++i) grad[i] *= GeluDerivative(x[i]);
      break;
    case Activation::kRelu:
      for (int64_t i = 0; i < n; ++i) grad[i] = x[i] <= 0.0f ? 0.0f : grad[i];
      break;
    case Activation::kSquaredRelu:
      for (int64_t i = 0; i < n; ++i) grad[i] = x[i] <= 0.0f ? 0.0f : grad[i] * 2.0f * x[i];
      break;
  }
}

void ForwardRows(const DenseActivationForwardParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t col = 0; col < p.cols; col += kBlock) {
      const int64_t n = Min(kBlock, p.cols - col), index = row * p.cols + col;
      float buffer[kBlock], bias_buffer[kBlock], out[kBlock];
      const float* x = LoadFloat(p.x, p.dtype, index, n, buffer);
      if (p.bias != nullptr) {
        const float* bias = LoadFloat(p.bias, p.dtype, col, n, bias_buffer);
        for (int64_t i = 0; i < n; ++i) buffer[i] = x[i] + bias[i];
        x = buffer;
        // As separate ops would: backward reads the rounded value.
        RoundRow(p.dtype, n, buffer);
      }
      if (p.out != nullptr) Activate(p.activation, x, n, out);
      if (p.pre_act != nullptr && (p.pre_act != p.x || p.bias != nullptr)) {
        StoreFloat(x, n, p.pre_act, p.dtype, index);
      }
      if (p.out != nullptr) StoreFloat(out, n, p.out, p.dtype, index);
    }
  }
}

// Columns [col, col + n) of a row; adds the gradient to `sum`.
inline void BackwardBlock(const DenseActivationBackwardParams& p, int64_t row, int64_t col,
                          int64_t n, float* __restrict__ sum) {
  const int64_t index = row * p.cols + col;
  float buffer[kBlock], x_buffer[kBlock];
  const float* grad = LoadFloat(p.dout, p.dtype, index, n, buffer);
  if (p.activation != Activation::kIdentity) {
    const float* x = LoadFloat(p.pre_act, p.dtype, index, n, x_buffer);
    if (grad != buffer) std::memcpy(buffer, grad, n * sizeof(float));
    MultiplyByDerivative(p.activation, x, n, buffer);
    grad = buffer;
  }
  if (p.dx != nullptr && (grad == buffer || p.dx != p.dout)) {
    StoreFloat(grad, n, p.dx, p.dtype, index);
  }
  for (int64_t i = 0; i < n; ++i) sum[i] += grad[i];
}

// The error of a sum grows with its longest chain of fp32 additions: kGroup, however many rows.
void BackwardRows(const DenseActivationBackwardParams& p, int64_t begin, int64_t end,
                  double* __restrict__ dbias) {
  constexpr int64_t kGroup = 16;
  for (int64_t first = begin; first < end; first += kGroup) {
    const int64_t last = Min(end, first + kGroup);
    for (int64_t col = 0; col < p.cols; col += kBlock) {
      const int64_t n = Min(kBlock, p.cols - col);
      float sum[kBlock] = {};
      for (int64_t row = first; row < last; ++row) BackwardBlock(p, row, col, n, sum);
      if (dbias == nullptr) continue;
      for (int64_t i = 0; i < n; ++i) dbias[col + i] += sum[i];
    }
  }
}

void ReduceColumns(const DenseActivationBackwardParams& p, const double* partials, int64_t count,
                   int64_t begin, int64_t end) {
  for (int64_t col = begin; col < end; col += kBlock) {
    const int64_t n = Min(kBlock, end - col);
    double sum[kBlock] = {};
    for (int64_t task = 0; task < count; ++task) {
      const double* __restrict__ partial = partials + task * p.cols + col;
      for (int64_t i = 0; i < n; ++i) sum[i] += partial[i];
    }
    float rounded[kBlock];
    for (int64_t i = 0; i < n; ++i) rounded[i] = static_cast<float>(sum[i]);
    StoreFloat(rounded, n, p.dbias, p.dtype, col);
  }
}

}  // namespace

#define FLASHTRAIN_CONCAT_(a, b) a##b
#define FLASHTRAIN_CONCAT(a, b) FLASHTRAIN_CONCAT_(a, b)

const DenseActivationCpuKernels FLASHTRAIN_CONCAT(kDenseActivationCpuKernels,
                                                  FLASHTRAIN_CPU_ISA_NAME) = {
    ForwardRows, BackwardRows, ReduceColumns};

}  // namespace flashtrain
