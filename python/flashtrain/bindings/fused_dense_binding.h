#pragma once

#include <pybind11/pybind11.h>

namespace flashtrain::bindings {

// dense_activation_forward, dense_activation_backward, and the dense_matmul functions.
void RegisterFusedDense(pybind11::module_& module);

}  // namespace flashtrain::bindings
