// One thread's share of the CPU path. Compiled once per instruction set: FLASHTRAIN_CPU_ISA_NAME is
// Baseline, V3 or V4.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "flashtrain/adamw/adamw_cpu.h"
#include "flashtrain/common/cpu_row.h"

namespace flashtrain {
namespace {

constexpr int64_t kBlock = 512;  // elements: what is converted stays in the first-level cache

inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }

void UpdateBlock(const AdamWCpuCoefficients& c, const float* __restrict__ grad,
                 float* __restrict__ p, float* __restrict__ m, float* __restrict__ v, int64_t n) {
  const AdamWCpuCoefficients k = c;  // in registers
  for (int64_t i = 0; i < n; ++i) {
    const float g = grad[i] * k.grad_factor;
    m[i] += k.beta1_complement * (g - m[i]);
    v[i] = k.beta2 * v[i] + k.beta2_complement * g * g;
    const float denominator = std::sqrt(v[i]) * k.inverse_sqrt_correction2 + k.eps;
    p[i] = p[i] * k.decay - k.step_size * m[i] / denominator;
  }
}

// Sets elements of the master that are not what the parameter was rounded from: see adamw.h.
void FollowParam(const AdamWTensor& t, int64_t begin, int64_t n) {
  const uint16_t* param = static_cast<const uint16_t*>(t.param) + begin;
  uint16_t rounded[kBlock];
  float* master = t.master + begin;
  StoreFloat(master, n, rounded, t.param_dtype, 0);
  if (std::memcmp(rounded, param, n * sizeof(uint16_t)) == 0) return;
  for (int64_t i = 0; i < n; ++i) {
    if (rounded[i] != param[i]) master[i] = LoadFloat1(param, t.param_dtype, i);
  }
}

void Update(const AdamWTensor& t, const AdamWCpuCoefficients& c, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = Min(kBlock, end - i);
    float grad_buffer[kBlock], param_buffer[kBlock];
    const float* grad = LoadFloat(t.grad, t.grad_dtype, i, n, grad_buffer);
    float* p = t.master + i;
    if (t.master == nullptr) {
      p = const_cast<float*>(LoadFloat(t.param, t.param_dtype, i, n, param_buffer));
    } else {
      FollowParam(t, i, n);
    }
    UpdateBlock(c, grad, p, t.exp_avg + i, t.exp_avg_sq + i, n);
    if (t.param_dtype != DType::kFloat32) StoreFloat(p, n, t.param, t.param_dtype, i);
  }
}

float SumOfSquaresInFloat(const GradNormTensor& t, int64_t begin, int64_t end) {
  LaneSum sum;
  for (int64_t i = begin; i < end; i += kBlock) {
    float buffer[kBlock];
    const int64_t n = Min(kBlock, end - i);
    const float* __restrict__ x = LoadFloat(t.grad, t.dtype, i, n, buffer);
    sum.Add(n, [x](int64_t j) { return x[j] * x[j]; });
  }
  return sum.Total();
}

double SumOfSquares(const GradNormTensor& t, int64_t begin, int64_t end) {
  // In long sums of low-precision squares, which have few bits, ties round alike: over 32,768
  // elements the sum comes out 2e-6 too small.
  constexpr int64_t kRun = 4096;
  double total = 0.0;
  for (int64_t i = begin; i < end; i += kRun) {
    total += SumOfSquaresInFloat(t, i, Min(i + kRun, end));
  }
  return total;
}

}  // namespace

#define FLASHTRAIN_CONCAT_(a, b) a##b
#define FLASHTRAIN_CONCAT(a, b) FLASHTRAIN_CONCAT_(a, b)
const AdamWCpuKernels FLASHTRAIN_CONCAT(kAdamWCpuKernels, FLASHTRAIN_CPU_ISA_NAME) = {Update,
                                                                                      SumOfSquares};

}  // namespace flashtrain
