#pragma once

#include <pybind11/pybind11.h>

namespace flashtrain::bindings {

// layer_norm_forward, layer_norm_backward and layer_norm_backward_workspace_bytes.
void RegisterLayerNorm(pybind11::module_& module);

}  // namespace flashtrain::bindings
