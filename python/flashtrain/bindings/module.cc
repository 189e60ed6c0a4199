// The extension module flashtrain._kernels: registration only, one line for each op.

#include <pybind11/pybind11.h>

#include "flashtrain/common/parallel.h"
#include "python/flashtrain/bindings/layer_norm_binding.h"

PYBIND11_MODULE(_kernels, module) {
  module.doc() = "flashtrain's C++ and CUDA kernels; signatures in _kernels.pyi.";
  module.def("set_num_threads", &flashtrain::SetNumThreads, pybind11::arg("num_threads"));
  module.def("get_num_threads", &flashtrain::GetNumThreads);
  flashtrain::bindings::RegisterLayerNorm(module);
}
