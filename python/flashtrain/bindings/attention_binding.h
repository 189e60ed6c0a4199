#pragma once

#include <pybind11/pybind11.h>

namespace flashtrain::bindings {

void RegisterAttention(pybind11::module_& module);

}  // namespace flashtrain::bindings
