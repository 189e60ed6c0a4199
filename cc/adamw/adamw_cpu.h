// Internal: the CPU side of adamw.h.
#pragma once

#include <cstdint>

#include "flashtrain/adamw/adamw.h"

namespace flashtrain {

// Params are valid (checked by AdamWStep and GradNorm).
void AdamWStepCpu(const AdamWParams& params);
void GradNormCpu(const GradNormParams& params);

// What the update of one tensor needs besides its elements.
struct AdamWCpuCoefficients {
  float grad_factor, decay, beta1_complement, beta2, beta2_complement;
  float step_size, inverse_sqrt_correction2, eps;
};

// What one thread does, compiled once per instruction set.
struct AdamWCpuKernels {
  // Elements [begin, end) of a tensor.
  void (*update)(const AdamWTensor& tensor, const AdamWCpuCoefficients& c, int64_t begin,
                 int64_t end);
  // The sum of squares of elements [begin, end).
  double (*sum_of_squares)(const GradNormTensor& tensor, int64_t begin, int64_t end);
};

extern const AdamWCpuKernels kAdamWCpuKernelsBaseline;
extern const AdamWCpuKernels kAdamWCpuKernelsV3;
extern const AdamWCpuKernels kAdamWCpuKernelsV4;

}  // namespace flashtrain
