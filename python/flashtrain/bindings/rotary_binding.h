#pragma once

#include <pybind11/pybind11.h>

namespace flashtrain::bindings {

// rotary.
void RegisterRotary(pybind11::module_& module);

}  // namespace flashtrain::bindings
