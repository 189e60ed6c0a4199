// Internal: the CPU side of cross_entropy.h.
#pragma once

#include <cstdint>

#include "flashtrain/cross_entropy/cross_entropy.h"

namespace flashtrain {

enum class CrossEntropyPass { kForward, kBackward, kForwardBackward };

// Params are valid for the pass, but for the labels: an error names the first that is out of range.
Status CrossEntropyCpu(const CrossEntropyParams& params, CrossEntropyPass pass);

// What one thread does, compiled once per instruction set: rows [begin, end) of the pass.
struct CrossEntropyCpuKernels {
  void (*rows)(const CrossEntropyParams& params, CrossEntropyPass pass, int64_t begin, int64_t end);
};

extern const CrossEntropyCpuKernels kCrossEntropyCpuKernelsBaseline;
extern const CrossEntropyCpuKernels kCrossEntropyCpuKernelsV3;
extern const CrossEntropyCpuKernels kCrossEntropyCpuKernelsV4;

}  // namespace flashtrain
