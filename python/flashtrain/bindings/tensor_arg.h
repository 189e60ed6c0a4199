#pragma once

// TensorArg: one tensor argument of a binding, a checked, non-owning view of what the caller
// passed.
//
// Three forms are accepted, all of them DLPack, so the extension needs no libtorch and one build
// serves every torch version (and numpy):
//   1. an object whose type has `__dlpack_c_exchange_api__` (torch): one C call. A whole forward
//      call with eight tensors takes 2.5 us; their data_ptr, shape, stride, dtype and device, read
//      in Python and passed as plain numbers, would add 0.3 us for each tensor;
//   2. a DLPack capsule (`torch.utils.dlpack.to_dlpack(t)`, 0.15 us), which is read, not consumed;
//   3. any other object with `__dlpack__` (numpy arrays, ...): a Python call.
// Forms 1 and 2 take tensors that require grad and never synchronise streams.
//
// The view is valid while the caller's object lives and is not resized: during the call. The
// capsule of form 3 lives as long as the call of the bound function that reads it.
//
// What DLPack does not say is asked of torch's types: tensors without memory of their own (fake
// ones, DTensor) are refused, and so are views with a negative bit, whose memory holds the negated
// numbers. That costs 0.1 us for each tensor, most of it in torch's is_neg, which lets go of the
// GIL.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "flashtrain/common/device.h"
#include "flashtrain/common/dtype.h"
#include "python/flashtrain/bindings/dlpack_abi.h"

namespace flashtrain::bindings {

// More elements than any memory holds. Sizes and strides up to this many leave room for products
// with bytes and blocks in 64 bits.
inline constexpr int64_t kMaxTensorElements = int64_t{1} << 48;

// Element types that some kernel takes.
enum class ElementType : int8_t { kFloat32, kFloat16, kBFloat16, kInt32, kInt64, kUInt8 };

class TensorArg {
 public:
  // `name` is a literal; every error starts with it. Throws ValueError for an element type or a
  // device that no kernel takes, for sizes beyond kMaxTensorElements and for elements without
  // memory, TypeError for an object that is not a tensor. Needs the GIL.
  TensorArg(const char* name, pybind11::handle object);

  ElementType element_type() const { return element_type_; }
  bool is_cuda() const { return view_.device.device_type == dlpack::kCuda; }
  Device device() const { return is_cuda() ? Device::Cuda() : Device::Cpu(); }
  int device_index() const { return is_cuda() ? view_.device.device_id : 0; }
  int ndim() const { return view_.ndim; }
  int64_t size(int dim) const { return view_.shape[dim]; }
  const int64_t* shape() const { return view_.shape; }
  int64_t stride(int dim) const;  // in elements
  template <typename T = void>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(view_.data) + view_.byte_offset);
  }

  // Checks: each throws std::invalid_argument (ValueError in Python) that names the argument, what
  // came and what is supported.
  DType float_dtype() const;  // checks that it is one of float32, float16, bfloat16
  void ExpectFloat(DType dtype) const;
  void ExpectElementType(ElementType type) const;
  void ExpectSameDevice(const TensorArg& other) const;
  void ExpectShape(const int64_t* shape, int ndim) const;
  void ExpectShape(std::initializer_list<int64_t> shape) const {
    ExpectShape(shape.begin(), static_cast<int>(shape.size()));
  }
  void ExpectContiguous() const;
  void ExpectNoOverlap() const;  // no two elements at one address, as of a tensor that is written

  int64_t num_elements() const;

  // The tensor [..., cols] as a matrix [rows, cols], all leading dimensions taken together, which
  // must be possible without a copy: adjacent columns, one stride from row to row.
  struct Matrix {
    int64_t rows;
    int64_t cols;
    int64_t row_stride;  // in elements
  };
  Matrix ExpectMatrix() const;

 private:
  void CheckSizesAndMemory() const;
  [[noreturn]] void Fail(const std::string& expected) const;

  const char* name_;
  dlpack::DLTensor view_;
  ElementType element_type_;
};

}  // namespace flashtrain::bindings
