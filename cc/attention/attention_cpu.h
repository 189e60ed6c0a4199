// Internal: the CPU side of attention.h.
#pragma once

#include <cstdint>

#include "flashtrain/attention/attention.h"

namespace flashtrain {

// Params are valid (checked by AttentionForward and AttentionBackward).
void AttentionForwardCpu(const AttentionForwardParams& params);
void AttentionBackwardCpu(const AttentionBackwardParams& params);

constexpr int64_t kAttentionQueryBlock = 64;  // queries of a forward task

// What one thread does, compiled once per instruction set.
struct AttentionCpuKernels {
  // Block `block` of kAttentionQueryBlock queries of one head of one sequence.
  void (*forward_block)(const AttentionForwardParams& params, int64_t sequence, int64_t head,
                        int64_t block, float* scratch);
  int64_t (*forward_scratch)(const AttentionForwardParams& params);  // floats
  // All gradients of one key head of one sequence, with the query heads that share it.
  void (*backward_head)(const AttentionBackwardParams& params, int64_t sequence, int64_t head_k,
                        float* scratch);
  int64_t (*backward_scratch)(const AttentionBackwardParams& params);  // floats
};

extern const AttentionCpuKernels kAttentionCpuKernelsBaseline;
extern const AttentionCpuKernels kAttentionCpuKernelsV3;
extern const AttentionCpuKernels kAttentionCpuKernelsV4;

}  // namespace flashtrain
