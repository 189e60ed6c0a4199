// Tasks of the CPU path.
#include "flashtrain/attention/attention_cpu.h"

#include <algorithm>
#include <vector>

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

int64_t Blocks(int64_t queries) {
  return (queries + kAttentionQueryBlock - 1) / kAttentionQueryBlock;
}

}  // namespace

void AttentionForwardCpu(const AttentionForwardParams& p) {
  if (p.max_seqlen_q == 0) return;
  const AttentionCpuKernels& kernels = Kernels();
  // By the lengths of the sequences: many may be far shorter than the longest.
  std::vector<int64_t> first_task(p.batch + 1, 0);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t queries =
        p.cu_seqlens_q == nullptr ? p.max_seqlen_q : p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b];
    first_task[b + 1] = first_task[b] + p.num_heads * Blocks(queries);
  }
  const int64_t scratch = kernels.forward_scratch(p);
  ParallelFor(first_task.back(), [&](int64_t task) {
    const auto after = std::upper_bound(first_task.begin(), first_task.end(), task);
    const int64_t sequence = after - first_task.begin() - 1;
    const int64_t blocks = (*after - first_task[sequence]) / p.num_heads;
    const int64_t block = task - first_task[sequence];
    // Under a causal mask the last blocks have the most work: they go first.
    kernels.forward_block(p, sequence, block / blocks, blocks - 1 - block % blocks,
                          ThreadScratch(scratch));
  });
}

void AttentionBackwardCpu(const AttentionBackwardParams& p) {
  if (p.max_seqlen_q == 0 && p.max_seqlen_k == 0) return;
  const AttentionCpuKernels& kernels = Kernels();
  const int64_t scratch = kernels.backward_scratch(p);
  ParallelFor(p.batch * p.num_heads_k, [&](int64_t task) {
    kernels.backward_head(p, task / p.num_heads_k, task % p.num_heads_k, ThreadScratch(scratch));
  });
}

}  // namespace flashtrain
