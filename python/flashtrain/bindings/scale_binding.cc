#include "python/flashtrain/bindings/scale_binding.h"

#include <cstdint>

#include "flashtrain/scale/scale.h"
#include "python/flashtrain/bindings/call.h"
#include "python/flashtrain/bindings/tensor_arg.h"

namespace flashtrain::bindings {
namespace {

namespace py = pybind11;

void ScaleTensor(py::handle x, py::handle factor, py::handle y, uintptr_t stream) {
  const TensorArg x_arg("x", x), factor_arg("factor", factor), y_arg("y", y);
  factor_arg.ExpectFloat(DType::kFloat32);
  factor_arg.ExpectShape({});
  y_arg.ExpectShape(x_arg.shape(), x_arg.ndim());
  ScaleParams p;
  p.count = x_arg.num_elements();
  for (const TensorArg* arg : {&factor_arg, &y_arg}) arg->ExpectSameDevice(x_arg);
  for (const TensorArg* arg : {&x_arg, &y_arg}) arg->ExpectContiguous();
  p.factor = factor_arg.data<const float>();
  p.x = x_arg.data(), p.x_dtype = x_arg.float_dtype();
  p.y = y_arg.data(), p.y_dtype = y_arg.float_dtype();
  Call(x_arg, [&](Device device) { return Scale(p, device, reinterpret_cast<void*>(stream)); });
}

}  // namespace

void RegisterScale(py::module_& module) {
  using py::arg;
  module.def("scale", &ScaleTensor, arg("x"), arg("factor"), arg("y"), Integer("stream"));
}

}  // namespace flashtrain::bindings
