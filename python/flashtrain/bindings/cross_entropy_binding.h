#pragma once

#include <pybind11/pybind11.h>

namespace flashtrain::bindings {

// cross_entropy_forward, cross_entropy_backward and cross_entropy_forward_backward.
void RegisterCrossEntropy(pybind11::module_& module);

}  // namespace flashtrain::bindings
