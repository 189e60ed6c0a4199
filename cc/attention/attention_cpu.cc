// Tasks of the CPU path.
#include "flashtrain/attention/attention_cpu.h"

#include "flashtrain/common/cpu_isa.h"
#include "flashtrain/common/parallel.h"

namespace flashtrain {
namespace {

const AttentionCpuKernels& Kernels() {
  switch (GetCpuIsa()) {
    case CpuIsa::kX86_64_V4:
      return kAttentionCpuKernelsV4;
    case CpuIsa::kX86_64_V3:
      return kAttentionCpuKernelsV3;
    case CpuIsa::kBaseline:
      break;
  }
  return kAttentionCpuKernelsBaseline;
}

}  // namespace

void AttentionForwardCpu(const AttentionForwardParams& p) {
  const AttentionCpuKernels& kernels = Kernels();
  const int64_t blocks = (p.max_seqlen_q + kAttentionQueryBlock - 1) / kAttentionQueryBlock;
  const int64_t scratch = kernels.forward_scratch(p);
  ParallelFor(p.batch * p.num_heads * blocks, [&](int64_t task) {
    const int64_t head = task / blocks;
    // Under a causal mask the last blocks have the most work: they go first.
    kernels.forward_block(p, head / p.num_heads, head % p.num_heads, blocks - 1 - task % blocks,
                          ThreadScratch(scratch));
  });
}

void AttentionBackwardCpu(const AttentionBackwardParams& p) {
  const AttentionCpuKernels& kernels = Kernels();
  const int64_t scratch = kernels.backward_scratch(p);
  ParallelFor(p.batch * p.num_heads_k, [&](int64_t task) {
    kernels.backward_head(p, task / p.num_heads_k, task % p.num_heads_k, ThreadScratch(scratch));
  });
}

}  // namespace flashtrain
