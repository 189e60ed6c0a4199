// Argument checks shared by ops. Each returns ok or an error that names the argument, what came and
// what is supported.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "flashtrain/common/dtype.h"
#include "flashtrain/common/status.h"

namespace flashtrain {

inline Status CheckNotNull(const void* ptr, const std::string& name, const std::string& why) {
  if (ptr != nullptr) return Status();
  return Status::InvalidArgument(name + " is null; it is required " + why);
}

inline Status CheckNull(const void* ptr, const std::string& name, const std::string& why) {
  if (ptr == nullptr) return Status();
  return Status::InvalidArgument(name + " must be null " + why);
}

inline Status CheckAtLeast(int64_t value, int64_t minimum, const std::string& name) {
  if (value >= minimum) return Status();
  return Status::InvalidArgument(name + " is " + std::to_string(value) + "; it must be at least " +
                                 std::to_string(minimum));
}

// More elements than any memory holds; counts up to this many leave room for products with bytes
// and blocks in 64 bits.
constexpr int64_t kMaxElements = int64_t{1} << 48;

// Sizes of at least 0, named by `name`, and their product; a size of 0 does not excuse the others.
inline Status CheckElements(std::initializer_list<int64_t> sizes, const std::string& name) {
  int64_t product = 1;
  for (const int64_t size : sizes) {
    if (size <= kMaxElements / product) {
      product *= size > 0 ? size : 1;
      continue;
    }
    std::string got;
    for (const int64_t each : sizes) got += (got.empty() ? "" : ", ") + std::to_string(each);
    return Status::InvalidArgument(name + ": got " + got + "; supported: at most 2**48 elements");
  }
  return Status();
}

inline Status CheckDType(DType dtype, std::initializer_list<DType> supported,
                         const std::string& name) {
  std::string names;
  for (const DType candidate : supported) {
    if (dtype == candidate) return Status();
    names += (names.empty() ? "" : ", ") + std::string(DTypeName(candidate));
  }
  return Status::InvalidArgument(name + " is " + DTypeName(dtype) + " (" +
                                 std::to_string(static_cast<int>(dtype)) +
                                 "); supported here: " + names);
}

// A [rows, cols] tensor: rows must not overlap.
inline Status CheckRowStride(const void* ptr, int64_t rows, int64_t cols, int64_t row_stride,
                             const std::string& name) {
  if (ptr == nullptr || rows <= 1 || row_stride >= cols) return Status();
  return Status::InvalidArgument(name + " is " + std::to_string(row_stride) +
                                 "; it must be at least cols = " + std::to_string(cols));
}

}  // namespace flashtrain
