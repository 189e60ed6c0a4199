// Internal: the CPU side of rotary.h.
#pragma once

#include <cstdint>

#include "flashtrain/rotary/rotary.h"

namespace flashtrain {

// Params are valid (checked by Rotary) but for positions that memory holds.
Status RotaryCpu(const RotaryParams& params);

// What one thread does, compiled once per instruction set.
struct RotaryCpuKernels {
  // Tokens [begin, end) of all sequences of the batch, whose positions are in the tables.
  // scratch: [3 * rotary_dim].
  void (*rotate_tokens)(const RotaryParams& params, int64_t begin, int64_t end, float* scratch);
};

extern const RotaryCpuKernels kRotaryCpuKernelsBaseline;
extern const RotaryCpuKernels kRotaryCpuKernelsV3;
extern const RotaryCpuKernels kRotaryCpuKernelsV4;

}  // namespace flashtrain
