// Internal: the CUDA side of fused_dense.h.
#pragma once

#include <cstdint>

#include "flashtrain/fused_dense/fused_dense.h"

namespace flashtrain {

// Params are valid (checked by DenseActivationForward and DenseActivationBackward).
Status DenseActivationForwardCuda(const DenseActivationForwardParams& params, void* stream);
Status DenseActivationBackwardCuda(const DenseActivationBackwardParams& params, void* stream);
int64_t DenseActivationBackwardWorkspaceBytesCuda(const DenseActivationBackwardParams& params);

}  // namespace flashtrain
