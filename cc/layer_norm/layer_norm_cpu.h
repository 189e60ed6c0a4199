// Internal: the CPU side of layer_norm.h.
#pragma once

#include <cstdint>

#include "flashtrain/layer_norm/layer_norm.h"

namespace flashtrain {

// Params are valid (checked by LayerNormForward and LayerNormBackward).
void LayerNormForwardCpu(const LayerNormForwardParams& params);
void LayerNormBackwardCpu(const LayerNormBackwardParams& params);
int64_t LayerNormBackwardWorkspaceBytesCpu(const LayerNormBackwardParams& params);

// What one thread does, compiled once per instruction set.
struct LayerNormCpuKernels {
  // Rows [begin, end). scratch: [3, cols].
  void (*forward_rows)(const LayerNormForwardParams& params, int64_t begin, int64_t end,
                       float* scratch);
  // Rows [begin, end); adds their weight gradients to each [cols] sum that is not null.
  // scratch: [cols].
  void (*backward_rows)(const LayerNormBackwardParams& params, int64_t begin, int64_t end,
                        float* dweight, float* dbias, float* dlayerscale, float* scratch);
  // totals += sums, of n each.
  void (*add_sums)(const float* sums, int64_t n, double* totals);
  // Columns [begin, end) of grad = the sum over `count` partials, in order, which are `stride`
  // doubles from each other.
  void (*reduce_columns)(const double* partials, int64_t count, int64_t stride, int64_t begin,
                         int64_t end, void* grad, DType dtype);
};

extern const LayerNormCpuKernels kLayerNormCpuKernelsBaseline;
extern const LayerNormCpuKernels kLayerNormCpuKernelsV3;
extern const LayerNormCpuKernels kLayerNormCpuKernelsV4;

}  // namespace flashtrain
