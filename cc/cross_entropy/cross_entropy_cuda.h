// Internal: the CUDA side of cross_entropy.h, between validation, launch and kernels.
#pragma once

#include <cstdint>

#include "flashtrain/cross_entropy/cross_entropy_cpu.h"

namespace flashtrain {

// Params are valid for the pass.
Status CrossEntropyCuda(const CrossEntropyParams& params, CrossEntropyPass pass, void* stream);

// The shape of a kernel; see cross_entropy_kernel.cuh. Measured on an H100.
struct CrossEntropyTile {
  int unroll;       // vectors that a thread loads at once
  int max_threads;  // of a CTA, which has one row
  int min_ctas;     // of a multiprocessor, which bounds a thread's registers
};

// Of 50,304 columns of bfloat16 these move 2.85 (forward), 2.96 (backward) and 2.67 TB/s (both at
// once, the row kept; read again: 2.59), where a copy moves 3.01. More threads with a row each
// leave too few rows in flight; fewer registers spill.
constexpr CrossEntropyTile CrossEntropyTileOf(CrossEntropyPass pass, bool keep) {
  if (keep) return {2, 256, 4};
  return pass == CrossEntropyPass::kForward ? CrossEntropyTile{4, 128, 8}
                                            : CrossEntropyTile{4, 512, 2};
}

struct CrossEntropyLaunch {
  int ctas = 0;
  int threads = 0;
  int shared_bytes = 0;  // for the row that a CTA keeps; 0: it reads the row again
};

// The kernels for one dtype. The result is a cudaError_t.
struct CrossEntropyCudaKernels {
  int (*launch)(const CrossEntropyParams& params, CrossEntropyPass pass,
                const CrossEntropyLaunch& launch, void* stream);
};

extern const CrossEntropyCudaKernels kCrossEntropyFloat32;
extern const CrossEntropyCudaKernels kCrossEntropyFloat16;
extern const CrossEntropyCudaKernels kCrossEntropyBFloat16;

}  // namespace flashtrain
