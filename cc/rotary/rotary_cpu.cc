// Positions and threads of the CPU path.
#include "flashtrain/rotary/rotary_cpu.h"

#include <algorithm>
#include <string>

#include "flashtrain/common/cpu_isa.h"
#include "flashtrain/common/parallel.h"
#include "flashtrain/rotary/rotary_position.h"

namespace flashtrain {
namespace {

const RotaryCpuKernels& Kernels() {
  switch (GetCpuIsa()) {
    case CpuIsa::kX86_64_V4:
      return kRotaryCpuKernelsV4;
    case CpuIsa::kX86_64_V3:
      return kRotaryCpuKernelsV3;
    case CpuIsa::kBaseline:
      break;
  }
  return kRotaryCpuKernelsBaseline;
}

Status CheckPositions(const RotaryParams& p) {
  if (p.position_ids == nullptr && p.cu_seqlens == nullptr && p.seqlen_offsets == nullptr) {
    return Status();  // checked with the other arguments
  }
  const std::string name = p.position_ids != nullptr     ? "position_ids"
                           : p.seqlen_offsets != nullptr ? "seqlen_offsets"
                                                         : "cu_seqlens";
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    for (int64_t token = 0; token < p.seqlen; ++token) {
      const RotaryPosition at = FindRotaryPosition(p, batch, token);
      if (at.token != RotaryToken::kOutsideTable) continue;
      return Status::InvalidArgument(
          name + ": token [" + std::to_string(batch) + ", " + std::to_string(token) +
          "] is at position " + std::to_string(at.position) + "; the tables hold positions 0 to " +
          std::to_string(p.table_len - 1));
    }
  }
  return Status();
}

}  // namespace

Status RotaryCpu(const RotaryParams& p) {
  FLASHTRAIN_RETURN_IF_ERROR(CheckPositions(p));
  const RotaryCpuKernels& kernels = Kernels();
  int64_t elements = 0;  // of a token
  for (int i = 0; i < p.num_parts; ++i) elements += p.parts[i].heads * p.head_dim;
  constexpr int64_t kElementsPerTask = 32768;  // less is not worth waking a thread
  const int64_t tokens_per_task = std::max<int64_t>(1, kElementsPerTask / elements);
  const int64_t tokens = p.batch * p.seqlen;
  ParallelFor((tokens + tokens_per_task - 1) / tokens_per_task, [&](int64_t task) {
    const int64_t begin = task * tokens_per_task;
    kernels.rotate_tokens(p, begin, std::min(tokens, begin + tokens_per_task),
                          ThreadScratch(3 * p.rotary_dim));
  });
  return Status();
}

}  // namespace flashtrain
