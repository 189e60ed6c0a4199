#pragma once

// RowwiseOperands: reads the arguments of an op on [rows, cols] matrices into its params struct,
// one line each, with the checks that all of them share.
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
#include <vector>

#include "flashtrain/common/dtype.h"
#include "python/flashtrain/bindings/tensor_arg.h"

namespace flashtrain::bindings {

class RowwiseOperands {
 public:
  RowwiseOperands(const char* name, pybind11::handle first);

  const TensorArg& first() const { return first_; }
  int64_t rows() const { return first_.size(0); }
  int64_t cols() const { return first_.size(1); }

  // [rows, cols], unit column stride, any row stride.
  template <typename T>
  void Matrix(const char* name, pybind11::handle object, T** data, int64_t* row_stride,
              std::optional<DType>* dtype) {
    if (object.is_none()) return;
    const TensorArg arg = Read(name, object);
    CheckMatrix(arg, dtype);
    *data = arg.data<T>();
    // A tensor of one row may report any stride.
    *row_stride = rows() > 1 ? arg.stride(0) : cols();
  }

  // [rows, cols] uint8, contiguous.
  void Mask(const char* name, pybind11::handle object, uint8_t** data);

  // [cols] and [rows], contiguous.
  template <typename T>
  void Columns(const char* name, pybind11::handle object, T** data, std::optional<DType>* dtype) {
    ReadVector(name, object, cols(), data, dtype);
  }
  template <typename T>
  void Rows(const char* name, pybind11::handle object, T** data, std::optional<DType>* dtype) {
    ReadVector(name, object, rows(), data, dtype);
  }

  // [rows] float32, contiguous: statistics kept for backward.
  template <typename T>
  void RowStatistics(const char* name, pybind11::handle object, T** data) {
    std::optional<DType> dtype = DType::kFloat32;
    ReadVector(name, object, rows(), data, &dtype);
  }

  // {seed, offset}: int64 [2].
  void RngState(const char* name, pybind11::handle object, const uint64_t** data);

 private:
  TensorArg Read(const char* name, pybind11::handle object);  // checks the device
  void CheckMatrix(const TensorArg& arg, std::optional<DType>* dtype) const;
  void CheckVector(const TensorArg& arg, int64_t size, std::optional<DType>* dtype) const;

  template <typename T>
  void ReadVector(const char* name, pybind11::handle object, int64_t size, T** data,
                  std::optional<DType>* dtype) {
    if (object.is_none()) return;
    const TensorArg arg = Read(name, object);
    CheckVector(arg, size, dtype);
    *data = arg.data<T>();
  }

  TensorArg first_;
  std::vector<pybind11::object> capsules_;  // what keeps the views alive that need it; often none
};

}  // namespace flashtrain::bindings
