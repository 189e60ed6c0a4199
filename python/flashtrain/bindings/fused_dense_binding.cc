#include "python/flashtrain/bindings/fused_dense_binding.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "flashtrain/fused_dense/fused_dense.h"
#include "python/flashtrain/bindings/call.h"
#include "python/flashtrain/bindings/tensor_arg.h"

namespace flashtrain::bindings {
namespace {

namespace py = pybind11;

// The arguments of one call: contiguous, on one device, of one dtype.
class Operands {
 public:
  Operands(const char* name, py::handle first) : first_(name, first) {
    first_.ExpectContiguous();
    dtype_ = first_.float_dtype();
    if (first_.ndim() == 0) throw std::invalid_argument(std::string(name) + ": got a scalar");
    for (int i = 0; i + 1 < first_.ndim(); ++i) rows_ *= first_.size(i);
  }

  const TensorArg& first() const { return first_; }
  DType dtype() const { return dtype_; }
  int64_t rows() const { return rows_; }  // all leading dimensions together
  int64_t cols() const { return first_.size(first_.ndim() - 1); }

  // Sets *data where `object` is not None.
  template <typename T>
  void Read(const char* name, py::handle object, const std::vector<int64_t>& shape, T** data) {
    if (object.is_none()) return;
    const TensorArg arg(name, object);
    arg.ExpectSameDevice(first_);
    arg.ExpectFloat(dtype_);
    arg.ExpectShape(shape.data(), static_cast<int>(shape.size()));
    arg.ExpectContiguous();
    *data = arg.data<T>();
  }

  // The leading dimensions of `first`, then `cols`.
  std::vector<int64_t> Shape(int64_t cols) const {
    std::vector<int64_t> shape(first_.shape(), first_.shape() + first_.ndim());
    shape.back() = cols;
    return shape;
  }

 private:
  TensorArg first_;
  DType dtype_;
  int64_t rows_ = 1;
};

// Checked before the value is narrowed to the enum's type.
Activation ToActivation(int64_t activation) {
  if (activation < 0 || activation > static_cast<int64_t>(Activation::kSquaredRelu)) {
    throw std::invalid_argument("activation: got " + std::to_string(activation) +
                                "; supported: 0, 1, 2, 3");
  }
  return static_cast<Activation>(activation);
}

DenseMatmul ToMatmul(int64_t matmul) {
  if (matmul < 0 || matmul > static_cast<int64_t>(DenseMatmul::kWeightGradient)) {
    throw std::invalid_argument("matmul: got " + std::to_string(matmul) + "; supported: 0, 1, 2");
  }
  return static_cast<DenseMatmul>(matmul);
}

void Forward(py::handle x, py::handle bias, int64_t activation, py::handle pre_act, py::handle out,
             uintptr_t stream) {
  Operands operands("x", x);
  const std::vector<int64_t> shape = operands.Shape(operands.cols());
  DenseActivationForwardParams p;
  p.rows = operands.rows(), p.cols = operands.cols(), p.dtype = operands.dtype();
  p.activation = ToActivation(activation);
  p.x = operands.first().data();
  operands.Read("bias", bias, {p.cols}, &p.bias);
  operands.Read("pre_act", pre_act, shape, &p.pre_act);
  operands.Read("out", out, shape, &p.out);
  Call(operands.first(), [&](Device device) {
    return DenseActivationForward(p, device, reinterpret_cast<void*>(stream));
  });
}

void Backward(py::handle dout, py::handle pre_act, int64_t activation, py::handle dx,
              py::handle dbias, const py::function& allocate, uintptr_t stream) {
  Operands operands("dout", dout);
  const std::vector<int64_t> shape = operands.Shape(operands.cols());
  DenseActivationBackwardParams p;
  p.rows = operands.rows(), p.cols = operands.cols(), p.dtype = operands.dtype();
  p.activation = ToActivation(activation);
  p.dout = operands.first().data();
  operands.Read("pre_act", pre_act, shape, &p.pre_act);
  operands.Read("dx", dx, shape, &p.dx);
  operands.Read("dbias", dbias, {p.cols}, &p.dbias);
  p.workspace_bytes = DenseActivationBackwardWorkspaceBytes(p, operands.first().device());
  const py::object workspace =
      AllocateWorkspace(operands.first(), allocate, p.workspace_bytes, &p.workspace);
  Call(operands.first(), [&](Device device) {
    return DenseActivationBackward(p, device, reinterpret_cast<void*>(stream));
  });
}

DenseMatmulParams ReadMatmul(Operands& operands, int64_t matmul, py::handle right, py::handle out,
                             py::handle bias, py::handle pre_act, py::handle dbias,
                             int64_t activation, bool allow_tf32) {
  const TensorArg right_arg("right", right);
  if (right_arg.ndim() == 0) throw std::invalid_argument("right: got a scalar");
  const int64_t left_cols = operands.cols();
  const int64_t right_cols = right_arg.size(right_arg.ndim() - 1);
  DenseMatmulParams p;
  p.matmul = ToMatmul(matmul);
  p.rows = operands.rows(), p.dtype = operands.dtype(), p.allow_tf32 = allow_tf32;
  p.activation = ToActivation(activation);
  p.left = operands.first().data();
  switch (p.matmul) {
    case DenseMatmul::kForward:
      p.in_features = left_cols, p.out_features = right_arg.size(0);
      operands.Read("right", right, {p.out_features, p.in_features}, &p.right);
      operands.Read("out", out, operands.Shape(p.out_features), &p.out);
      operands.Read("bias", bias, {p.out_features}, &p.bias);
      break;
    case DenseMatmul::kInputGradient:
      p.in_features = right_cols, p.out_features = left_cols;
      operands.Read("right", right, {p.out_features, p.in_features}, &p.right);
      operands.Read("out", out, operands.Shape(p.in_features), &p.out);
      operands.Read("dbias", dbias, {p.in_features}, &p.dbias);
      break;
    case DenseMatmul::kWeightGradient:
      p.in_features = right_cols, p.out_features = left_cols;
      operands.Read("right", right, operands.Shape(p.in_features), &p.right);
      operands.Read("out", out, {p.out_features, p.in_features}, &p.out);
      operands.Read("dbias", dbias, {p.out_features}, &p.dbias);
      break;
  }
  const bool forward = p.matmul == DenseMatmul::kForward;
  operands.Read("pre_act", pre_act, operands.Shape(forward ? p.out_features : p.in_features),
                &p.pre_act);
  if (!operands.first().is_cuda()) {
    throw std::invalid_argument("left: is on cpu; supported: cuda");
  }
  return p;
}

using Algorithm = std::pair<py::bytes, int64_t>;

DenseMatmulAlgorithm ToAlgorithm(const Algorithm& algorithm) {
  const std::string bytes = algorithm.first;
  DenseMatmulAlgorithm result;
  if (bytes.size() != sizeof(result.data)) {
    throw std::invalid_argument("algorithm: got " + std::to_string(bytes.size()) +
                                " bytes; supported: " + std::to_string(sizeof(result.data)));
  }
  std::memcpy(result.data, bytes.data(), bytes.size());
  if (algorithm.second < 0) {
    throw std::invalid_argument("algorithm: got a workspace of " +
                                std::to_string(algorithm.second) + " bytes; supported: at least 0");
  }
  result.workspace_bytes = algorithm.second;
  return result;
}

std::vector<Algorithm> Algorithms(int64_t matmul, py::handle left, py::handle right, py::handle out,
                                  py::handle bias, py::handle pre_act, py::handle dbias,
                                  int64_t activation, bool allow_tf32, int64_t max_algorithms) {
  constexpr int64_t kMaxAlgorithms = 1000;  // the library has fewer
  if (max_algorithms < 1 || max_algorithms > kMaxAlgorithms) {
    throw std::invalid_argument("max_algorithms: got " + std::to_string(max_algorithms) +
                                "; supported: 1 to " + std::to_string(kMaxAlgorithms));
  }
  Operands operands("left", left);
  const DenseMatmulParams p =
      ReadMatmul(operands, matmul, right, out, bias, pre_act, dbias, activation, allow_tf32);
  std::vector<DenseMatmulAlgorithm> found;
  Call(operands.first(),
       [&](Device) { return DenseMatmulAlgorithms(p, static_cast<int>(max_algorithms), &found); });
  std::vector<Algorithm> algorithms;
  for (const DenseMatmulAlgorithm& algorithm : found) {
    algorithms.emplace_back(
        py::bytes(reinterpret_cast<const char*>(algorithm.data), sizeof(algorithm.data)),
        algorithm.workspace_bytes);
  }
  return algorithms;
}

void Check(int64_t matmul, py::handle left, py::handle right, py::handle out, py::handle bias,
           py::handle pre_act, py::handle dbias, int64_t activation, bool allow_tf32,
           const Algorithm& algorithm) {
  Operands operands("left", left);
  const DenseMatmulParams p =
      ReadMatmul(operands, matmul, right, out, bias, pre_act, dbias, activation, allow_tf32);
  const DenseMatmulAlgorithm chosen = ToAlgorithm(algorithm);
  Call(operands.first(), [&](Device) { return DenseMatmulCheck(p, chosen); });
}

void Matmul(int64_t matmul, py::handle left, py::handle right, py::handle out, py::handle bias,
            py::handle pre_act, py::handle dbias, int64_t activation, bool allow_tf32,
            const Algorithm& algorithm, const py::function& allocate, uintptr_t stream) {
  Operands operands("left", left);
  const DenseMatmulParams p =
      ReadMatmul(operands, matmul, right, out, bias, pre_act, dbias, activation, allow_tf32);
  const DenseMatmulAlgorithm chosen = ToAlgorithm(algorithm);
  void* workspace = nullptr;
  const py::object owner =
      AllocateWorkspace(operands.first(), allocate, chosen.workspace_bytes, &workspace);
  Call(operands.first(), [&](Device) {
    return DenseMatmulRun(p, chosen, workspace, reinterpret_cast<void*>(stream));
  });
}

int64_t Version() {
  int64_t version = 0;
  ThrowIfError(DenseMatmulVersion(&version));
  return version;
}

}  // namespace

void RegisterFusedDense(py::module_& module) {
  using py::arg;
  module.def("dense_activation_forward", &Forward, arg("x"), arg("bias"), Integer("activation"),
             arg("pre_act"), arg("out"), Integer("stream"));
  module.def("dense_activation_backward", &Backward, arg("dout"), arg("pre_act"),
             Integer("activation"), arg("dx"), arg("dbias"), arg("allocate"), Integer("stream"));
  module.def("dense_matmul_version", &Version);
  module.def("dense_matmul_algorithms", &Algorithms, Integer("matmul"), arg("left"), arg("right"),
             arg("out"), arg("bias"), arg("pre_act"), arg("dbias"), Integer("activation"),
             arg("allow_tf32"), Integer("max_algorithms"));
  module.def("dense_matmul_check", &Check, Integer("matmul"), arg("left"), arg("right"), arg("out"),
             arg("bias"), arg("pre_act"), arg("dbias"), Integer("activation"), arg("allow_tf32"),
             arg("algorithm"));
  module.def("dense_matmul", &Matmul, Integer("matmul"), arg("left"), arg("right"), arg("out"),
             arg("bias"), arg("pre_act"), arg("dbias"), Integer("activation"), arg("allow_tf32"),
             arg("algorithm"), arg("allocate"), Integer("stream"));
}

}  // namespace flashtrain::bindings
