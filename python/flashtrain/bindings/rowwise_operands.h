#pragma once

// RowwiseOperands: reads the arguments of an op on matrices into its params struct, one line each,
// with the checks that all of them share. A matrix is [..., cols]; its leading dimensions together
// are the rows, so callers need not flatten.
//
//   RowwiseOperands operands("x0", x0);          // fixes rows, cols and the device
//   std::optional<DType> weight_dtype;           // shared by weight and bias
//   operands.Columns("weight", weight, &params.weight, &weight_dtype);
//   operands.Columns("bias", bias, &params.bias, &weight_dtype);
//
// Every reader leaves the fields alone where the argument is None (whether that is allowed is the
// op's own check), and throws ValueError, naming the argument, where it does not fit. A dtype that
// several arguments share is set by the first of them and required of the others.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>

#include "flashtrain/common/dtype.h"
#include "python/flashtrain/bindings/tensor_arg.h"

namespace flashtrain::bindings {

class RowwiseOperands {
 public:
  RowwiseOperands(const char* name, pybind11::handle first);

  const TensorArg& first() const { return first_; }
  int64_t rows() const { return matrix_.rows; }
  int64_t cols() const { return matrix_.cols; }

  // The shape of `first`, adjacent columns, any row stride.
  template <typename T>
  void Matrix(const char* name, pybind11::handle object, T** data, int64_t* row_stride,
              std::optional<DType>* dtype) {
    if (object.is_none()) return;
    const TensorArg arg = Read(name, object);
    *row_stride = CheckMatrix(arg, dtype);
    *data = arg.data<T>();
  }

  // The shape of `first`, uint8, contiguous.
  void Mask(const char* name, pybind11::handle object, uint8_t** data);

  // [cols], contiguous.
  template <typename T>
  void Columns(const char* name, pybind11::handle object, T** data, std::optional<DType>* dtype) {
    if (object.is_none()) return;
    const TensorArg arg = Read(name, object);
    CheckColumns(arg, dtype);
    *data = arg.data<T>();
  }

  // The shape of `first` without its last dimension, contiguous: one element for each row.
  template <typename T>
  void Rows(const char* name, pybind11::handle object, T** data, std::optional<DType>* dtype) {
    if (object.is_none()) return;
    const TensorArg arg = Read(name, object);
    CheckRows(arg, dtype);
    *data = arg.data<T>();
  }

  // Rows() in float32: statistics kept for backward.
  template <typename T>
  void RowStatistics(const char* name, pybind11::handle object, T** data) {
    std::optional<DType> dtype = DType::kFloat32;
    Rows(name, object, data, &dtype);
  }

  // float32, one element for each row, contiguous, or all of them one element (stride 0).
  void RowsOrOne(const char* name, pybind11::handle object, const float** data, int64_t* stride);

  // int64 or int32, one element for each row, contiguous.
  void Labels(const char* name, pybind11::handle object, const void** data, bool* is_int32);

  // {seed, offset}: int64 [2].
  void RngState(const char* name, pybind11::handle object, const uint64_t** data);

 private:
  TensorArg Read(const char* name, pybind11::handle object);  // checks the device
  int64_t CheckMatrix(const TensorArg& arg, std::optional<DType>* dtype) const;
  void CheckColumns(const TensorArg& arg, std::optional<DType>* dtype) const;
  void CheckRows(const TensorArg& arg, std::optional<DType>* dtype) const;

  TensorArg first_;
  TensorArg::Matrix matrix_;
};

}  // namespace flashtrain::bindings
