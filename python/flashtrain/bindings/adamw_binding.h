#pragma once

#include <pybind11/pybind11.h>

namespace flashtrain::bindings {

// adamw_step, adamw_table_bytes and grad_norm.
void RegisterAdamW(pybind11::module_& module);

}  // namespace flashtrain::bindings
