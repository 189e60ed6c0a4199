#include "python/flashtrain/bindings/layer_norm_binding.h"

#include <cstdint>
#include <optional>
#include <stdexcept>

#include "flashtrain/layer_norm/layer_norm.h"
#include "python/flashtrain/bindings/call.h"
#include "python/flashtrain/bindings/rowwise_operands.h"

namespace flashtrain::bindings {
namespace {

namespace py = pybind11;
using std::optional;

void Forward(py::handle x0, py::handle residual, py::handle weight, py::handle bias,
             py::handle rowscale, py::handle layerscale, py::handle rng_state, float dropout_p,
             float epsilon, bool is_rms_norm, bool zero_centered_weight, py::handle z, py::handle x,
             py::handle mean, py::handle rstd, py::handle dropout_mask, uintptr_t stream) {
  RowwiseOperands operands("x0", x0);
  optional<DType> x0_dtype, x_dtype, z_dtype, weight_dtype, rowscale_dtype;
  LayerNormForwardParams p;
  p.rows = operands.rows();
  p.cols = operands.cols();
  operands.Matrix("x0", x0, &p.x0, &p.x0_row_stride, &x0_dtype);
  operands.Matrix("residual", residual, &p.residual, &p.residual_row_stride, &x_dtype);
  operands.Columns("weight", weight, &p.weight, &weight_dtype);
  operands.Columns("bias", bias, &p.bias, &weight_dtype);
  operands.Rows("rowscale", rowscale, &p.rowscale, &rowscale_dtype);
  operands.Columns("layerscale", layerscale, &p.layerscale, &weight_dtype);
  operands.RngState("rng_state", rng_state, &p.rng_state);
  operands.Matrix("z", z, &p.z, &p.z_row_stride, &z_dtype);
  operands.Matrix("x", x, &p.x, &p.x_row_stride, &x_dtype);
  operands.RowStatistics("mean", mean, &p.mean);
  operands.RowStatistics("rstd", rstd, &p.rstd);
  operands.Mask("dropout_mask", dropout_mask, &p.dropout_mask);
  p.x0_dtype = *x0_dtype;
  p.x_dtype = x_dtype.value_or(p.x0_dtype);
  p.z_dtype = z_dtype.value_or(p.x0_dtype);
  p.weight_dtype = weight_dtype.value_or(DType::kFloat32);
  p.rowscale_dtype = rowscale_dtype.value_or(DType::kFloat32);
  p.dropout_p = dropout_p;
  p.epsilon = epsilon;
  p.is_rms_norm = is_rms_norm;
  p.zero_centered_weight = zero_centered_weight;
  Call(operands.first(),
       [&](Device device) { return LayerNormForward(p, device, reinterpret_cast<void*>(stream)); });
}

void Backward(py::handle dz, py::handle dx, py::handle x, py::handle x0, py::handle mean,
              py::handle rstd, py::handle weight, py::handle rowscale, py::handle layerscale,
              py::handle rng_state, float dropout_p, bool is_rms_norm, bool zero_centered_weight,
              py::handle dx0, py::handle dresidual, py::handle dweight, py::handle dbias,
              py::handle dlayerscale, const py::function& allocate, uintptr_t stream) {
  RowwiseOperands operands("dz", dz);
  optional<DType> z_dtype, x_dtype, x0_dtype, weight_dtype, rowscale_dtype;
  LayerNormBackwardParams p;
  p.rows = operands.rows();
  p.cols = operands.cols();
  operands.Matrix("dz", dz, &p.dz, &p.dz_row_stride, &z_dtype);
  operands.Matrix("dx", dx, &p.dx, &p.dx_row_stride, &x_dtype);
  operands.Matrix("x", x, &p.x, &p.x_row_stride, &x_dtype);
  operands.Matrix("x0", x0, &p.x0, &p.x0_row_stride, &x0_dtype);
  operands.RowStatistics("mean", mean, &p.mean);
  operands.RowStatistics("rstd", rstd, &p.rstd);
  operands.Columns("weight", weight, &p.weight, &weight_dtype);
  operands.Rows("rowscale", rowscale, &p.rowscale, &rowscale_dtype);
  operands.Columns("layerscale", layerscale, &p.layerscale, &weight_dtype);
  operands.RngState("rng_state", rng_state, &p.rng_state);
  operands.Matrix("dx0", dx0, &p.dx0, &p.dx0_row_stride, &x0_dtype);
  operands.Matrix("dresidual", dresidual, &p.dresidual, &p.dresidual_row_stride, &x_dtype);
  operands.Columns("dweight", dweight, &p.dweight, &weight_dtype);
  operands.Columns("dbias", dbias, &p.dbias, &weight_dtype);
  operands.Columns("dlayerscale", dlayerscale, &p.dlayerscale, &weight_dtype);
  p.z_dtype = *z_dtype;
  p.x_dtype = x_dtype.value_or(p.z_dtype);
  p.x0_dtype = x0_dtype.value_or(p.x_dtype);
  p.weight_dtype = weight_dtype.value_or(DType::kFloat32);
  p.rowscale_dtype = rowscale_dtype.value_or(DType::kFloat32);
  p.dropout_p = dropout_p;
  p.is_rms_norm = is_rms_norm;
  p.zero_centered_weight = zero_centered_weight;

  {
    DeviceGuard guard(operands.first());
    p.workspace_bytes = LayerNormBackwardWorkspaceBytes(p, operands.first().device());
  }
  const py::object workspace =
      AllocateWorkspace(operands.first(), allocate, p.workspace_bytes, &p.workspace);
  Call(operands.first(), [&](Device device) {
    return LayerNormBackward(p, device, reinterpret_cast<void*>(stream));
  });
}

}  // namespace

void RegisterLayerNorm(py::module_& module) {
  using py::arg;
  module.def("layer_norm_forward", &Forward, arg("x0"), arg("residual"), arg("weight"), arg("bias"),
             arg("rowscale"), arg("layerscale"), arg("rng_state"), arg("dropout_p"), arg("epsilon"),
             arg("is_rms_norm"), arg("zero_centered_weight"), arg("z"), arg("x"), arg("mean"),
             arg("rstd"), arg("dropout_mask"), Integer("stream"));
  module.def("layer_norm_backward", &Backward, arg("dz"), arg("dx"), arg("x"), arg("x0"),
             arg("mean"), arg("rstd"), arg("weight"), arg("rowscale"), arg("layerscale"),
             arg("rng_state"), arg("dropout_p"), arg("is_rms_norm"), arg("zero_centered_weight"),
             arg("dx0"), arg("dresidual"), arg("dweight"), arg("dbias"), arg("dlayerscale"),
             arg("allocate"), Integer("stream"));
}

}  // namespace flashtrain::bindings
