#include "python/flashtrain/bindings/rowwise_operands.h"

namespace flashtrain::bindings {
namespace {

namespace py = pybind11;

void CheckDType(const TensorArg& arg, std::optional<DType>* dtype) {
  if (!dtype->has_value()) *dtype = arg.float_dtype();
  arg.ExpectFloat(**dtype);
}

}  // namespace

RowwiseOperands::RowwiseOperands(const char* name, py::handle first)
    : first_(name, first), matrix_(first_.ExpectMatrix()) {}

TensorArg RowwiseOperands::Read(const char* name, py::handle object) {
  TensorArg arg(name, object);
  arg.ExpectSameDevice(first_);
  return arg;
}

void RowwiseOperands::Mask(const char* name, py::handle object, uint8_t** data) {
  if (object.is_none()) return;
  const TensorArg arg = Read(name, object);
  arg.ExpectShape(first_.shape(), first_.ndim());
  arg.ExpectContiguous();
  arg.ExpectElementType(ElementType::kUInt8);
  *data = arg.data<uint8_t>();
}

void RowwiseOperands::RngState(const char* name, py::handle object, const uint64_t** data) {
  if (object.is_none()) return;
  const TensorArg arg = Read(name, object);
  arg.ExpectShape({2});
  arg.ExpectContiguous();
  arg.ExpectElementType(ElementType::kInt64);
  *data = arg.data<const uint64_t>();
}

void RowwiseOperands::RowsOrOne(const char* name, py::handle object, const float** data,
                                int64_t* stride) {
  if (object.is_none()) return;
  const TensorArg arg = Read(name, object);
  arg.ExpectShape(first_.shape(), first_.ndim() - 1);
  arg.ExpectFloat(DType::kFloat32);
  bool one = arg.ndim() > 0;
  for (int i = 0; i < arg.ndim(); ++i) one = one && (arg.stride(i) == 0 || arg.size(i) == 1);
  if (!one) arg.ExpectContiguous();
  *stride = one ? 0 : 1;
  *data = arg.data<const float>();
}

void RowwiseOperands::Labels(const char* name, py::handle object, const void** data,
                             bool* is_int32) {
  if (object.is_none()) return;
  const TensorArg arg = Read(name, object);
  arg.ExpectShape(first_.shape(), first_.ndim() - 1);
  *is_int32 = arg.element_type() == ElementType::kInt32;
  if (!*is_int32) arg.ExpectElementType(ElementType::kInt64);
  arg.ExpectContiguous();
  *data = arg.data<const void>();
}

int64_t RowwiseOperands::CheckMatrix(const TensorArg& arg, std::optional<DType>* dtype) const {
  arg.ExpectShape(first_.shape(), first_.ndim());
  CheckDType(arg, dtype);
  return arg.ExpectMatrix().row_stride;
}

void RowwiseOperands::CheckColumns(const TensorArg& arg, std::optional<DType>* dtype) const {
  arg.ExpectShape({cols()});
  arg.ExpectContiguous();
  CheckDType(arg, dtype);
}

void RowwiseOperands::CheckRows(const TensorArg& arg, std::optional<DType>* dtype) const {
  arg.ExpectShape(first_.shape(), first_.ndim() - 1);
  arg.ExpectContiguous();
  CheckDType(arg, dtype);
}

}  // namespace flashtrain::bindings
