// Internal: the CUDA side of scale.h.
#pragma once

#include "flashtrain/scale/scale.h"

namespace flashtrain {

// Params are valid.
Status ScaleCuda(const ScaleParams& params, void* stream);

}  // namespace flashtrain
