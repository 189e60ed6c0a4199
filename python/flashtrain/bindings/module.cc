// The extension module flashtrain._kernels: registration only, one line for each op.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "flashtrain/common/parallel.h"
#include "python/flashtrain/bindings/adamw_binding.h"
#include "python/flashtrain/bindings/attention_binding.h"
#include "python/flashtrain/bindings/call.h"
#include "python/flashtrain/bindings/cross_entropy_binding.h"
#include "python/flashtrain/bindings/fused_dense_binding.h"
#include "python/flashtrain/bindings/layer_norm_binding.h"
#include "python/flashtrain/bindings/rotary_binding.h"
#include "python/flashtrain/bindings/scale_binding.h"

namespace {

void SetNumThreads(int64_t num_threads) {
  if (num_threads < 1 || num_threads > flashtrain::kMaxThreads) {
    throw std::invalid_argument("num_threads: got " + std::to_string(num_threads) +
                                "; supported: 1 to " + std::to_string(flashtrain::kMaxThreads));
  }
  flashtrain::SetNumThreads(static_cast<int>(num_threads));
}

}  // namespace

PYBIND11_MODULE(_kernels, module) {
  module.doc() = "flashtrain's C++ and CUDA kernels; signatures in _kernels.pyi.";
  module.def("set_num_threads", &SetNumThreads, flashtrain::bindings::Integer("num_threads"));
  module.def("get_num_threads", &flashtrain::GetNumThreads);
  flashtrain::bindings::RegisterAdamW(module);
  flashtrain::bindings::RegisterCrossEntropy(module);
  flashtrain::bindings::RegisterFusedDense(module);
  flashtrain::bindings::RegisterAttention(module);
  flashtrain::bindings::RegisterLayerNorm(module);
  flashtrain::bindings::RegisterRotary(module);
  flashtrain::bindings::RegisterScale(module);
}
