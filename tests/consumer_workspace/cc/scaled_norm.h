// z = scale * LayerNorm(x) on CUDA: flashtrain's kernel followed by one of the consumer.
#pragma once

#include <cuda_runtime_api.h>

#include "flashtrain/layer_norm/layer_norm.h"

namespace consumer {

// Runs LayerNormForward on the current device, then scales params.z, which must be float32 and
// contiguous.
flashtrain::Status ScaledNorm(const flashtrain::LayerNormForwardParams& params, float scale,
                              cudaStream_t stream);

}  // namespace consumer
