// Internal: the CUDA side of rotary.h, between validation, launch and kernel.
#pragma once

#include <cstdint>

#include "flashtrain/rotary/rotary.h"

namespace flashtrain {

// Params are valid (checked by Rotary).
Status RotaryCuda(const RotaryParams& params, void* stream);

// How a launch spreads slices (x), groups of heads (y) and tokens (z) over the threads of a CTA,
// and tokens (x), groups (y) and slices (z) over the grid; see rotary_kernel.cuh.
struct RotaryTile {
  static constexpr int kMaxThreads = 256;

  int slices = 0;                                 // per head
  int groups = 0;                                 // per token
  int head_groups[RotaryParams::kMaxParts] = {};  // of each part
  int cta_slices = 0, cta_groups = 0, cta_tokens = 0;
  int64_t grid_tokens = 0, grid_groups = 0, grid_slices = 0;
};

// The kernels of one dtype.
struct RotaryCudaKernels {
  // `pairs` in a slice: as many as 16 or 8 bytes hold elements, or 1. The result is a cudaError_t.
  int (*launch)(const RotaryParams& params, const RotaryTile& tile, int pairs, void* stream);
};

// Heads per thread. On an H100, 32 x 1024 x 12 x 64 bf16 queries and keys: 2.76 TB/s, with 1
// head 2.71, with 4 2.72.
inline constexpr int kRotaryHeadsPerThread = 2;

extern const RotaryCudaKernels kRotaryFloat32;
extern const RotaryCudaKernels kRotaryFloat16;
extern const RotaryCudaKernels kRotaryBFloat16;

}  // namespace flashtrain
