// Internal: the CUDA side of adamw.h, and what its kernels read.
#pragma once

#include <cstdint>

#include "flashtrain/adamw/adamw.h"

namespace flashtrain {

// Params are valid (checked by AdamWStep and GradNorm).
Status AdamWStepCuda(const AdamWParams& params, void* stream);
Status GradNormCuda(const GradNormParams& params, void* stream);

// Elements of a tensor that one CTA takes, and its threads. On an H100, 1.3e9 fp32 parameters: 2.96
// TB/s; chunks of 16,384 2.90, with two vectors per thread at once 2.88.
inline constexpr int64_t kAdamWChunk = 4096;
inline constexpr int kAdamWThreads = 256;

// The table: a header, a record for each tensor, then, if there are more than kAdamWGroupsByValue,
// one for each group.
struct alignas(16) AdamWTableHeader {
  uint32_t finished_ctas;  // of the launch in flight; 0 between launches
};

struct alignas(16) AdamWRecord {
  void* param;
  float* master;
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  float* step;
  int64_t numel;
  int32_t first_chunk;  // chunks of the tensors before
  uint16_t group;
  DType param_dtype : 3;
  DType grad_dtype : 3;
  bool vectorizable : 1;
};

// An AdamWGroup as the kernel reads it.
struct AdamWGroupRecord {
  double beta1, beta2;
  const float* lr_on_device;
  float lr, one_minus_beta1, one_minus_beta2, eps, weight_decay;
};
inline constexpr int kAdamWGroupsByValue = 32;

}  // namespace flashtrain
