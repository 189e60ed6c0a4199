// Internal: the CPU side of fused_dense.h.
#pragma once

#include <cstdint>

#include "flashtrain/fused_dense/fused_dense.h"

namespace flashtrain {

// Params are valid (checked by DenseActivationForward and DenseActivationBackward).
void DenseActivationForwardCpu(const DenseActivationForwardParams& params);
void DenseActivationBackwardCpu(const DenseActivationBackwardParams& params);
int64_t DenseActivationBackwardWorkspaceBytesCpu(const DenseActivationBackwardParams& params);

// What one thread does, compiled once per instruction set.
struct DenseActivationCpuKernels {
  // Rows [begin, end).
  void (*forward_rows)(const DenseActivationForwardParams& params, int64_t begin, int64_t end);
  // Rows [begin, end); adds their sums over rows to dbias, [cols], if it is not null.
  void (*backward_rows)(const DenseActivationBackwardParams& params, int64_t begin, int64_t end,
                        double* dbias);
  // Columns [begin, end) of dbias = the sum over [count, cols] partials, in order.
  void (*reduce_columns)(const DenseActivationBackwardParams& params, const double* partials,
                         int64_t count, int64_t begin, int64_t end);
};

extern const DenseActivationCpuKernels kDenseActivationCpuKernelsBaseline;
extern const DenseActivationCpuKernels kDenseActivationCpuKernelsV3;
extern const DenseActivationCpuKernels kDenseActivationCpuKernelsV4;

}  // namespace flashtrain
