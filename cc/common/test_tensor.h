// A [rows, cols] tensor of the device under test with its values on the host in fp64.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "flashtrain/common/cpu_row.h"
#include "flashtrain/common/dtype.h"
#include "flashtrain/common/test_memory.h"
#include "flashtrain/common/testing.h"

namespace flashtrain::testing {

// Half the spacing of a dtype's values, relative.
inline double RoundingError(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return std::ldexp(1.0, -24);
    case DType::kFloat16:
      return std::ldexp(1.0, -11);
    default:
      return std::ldexp(1.0, -8);
  }
}

// How a tensor lies in memory: elements between rows, and before the first.
struct Layout {
  int64_t padding = 0, offset = 0;
};

class TestTensor {
 public:
  // An output: poisoned with NaN bits, like everything around the rows.
  TestTensor(int64_t rows, int64_t cols, DType dtype, Layout layout = Layout())
      : rows_(rows),
        cols_(cols),
        stride_(cols + layout.padding),
        offset_(layout.offset),
        dtype_(dtype) {
    const int64_t elements = offset_ + (rows_ > 0 ? (rows_ - 1) * stride_ + cols_ : 0) + kGuard;
    base_ = static_cast<char*>(Allocate(elements * DTypeSize(dtype)));
    const std::vector<char> poison(std::max(offset_, cols_ + kGuard) * DTypeSize(dtype), '\xFF');
    CopyToDevice(base_, poison.data(), offset_ * DTypeSize(dtype));
    for (int64_t row = 0; row < rows_; ++row) {
      CopyToDevice(RowPtr(row), poison.data(), (cols_ + Guard(row)) * DTypeSize(dtype));
    }
  }
  ~TestTensor() { Free(base_); }
  TestTensor(const TestTensor&) = delete;
  TestTensor& operator=(const TestTensor&) = delete;

  // Fills with normal values, rounded to the dtype.
  void FillNormal(std::mt19937_64& random, double mean, double stddev) {
    std::normal_distribution<double> normal(mean, stddev);
    values_.resize(rows_ * cols_);
    for (double& value : values_) value = normal(random);
    Upload();
  }

  void Set(int64_t row, int64_t col, double value) {
    values_[row * cols_ + col] = value;
    Upload();
  }

  // Replaces every value by f(row, col, value).
  template <typename F>
  void Update(F f) {
    for (int64_t i = 0; i < rows_ * cols_; ++i) values_[i] = f(i / cols_, i % cols_, values_[i]);
    Upload();
  }

  double At(int64_t row, int64_t col) const { return values_[row * cols_ + col]; }
  void* data() const { return RowPtr(0); }
  int64_t stride() const { return stride_; }
  DType dtype() const { return dtype_; }

  // Reads the device's values; what lies between and after the rows must still be poison.
  void Download() {
    values_.resize(rows_ * cols_);
    bits_.clear();
    for (int64_t row = 0; row < rows_; ++row) {
      std::vector<char> raw((cols_ + Guard(row)) * DTypeSize(dtype_));
      CopyToHost(raw.data(), RowPtr(row), raw.size());
      const size_t used = cols_ * DTypeSize(dtype_);
      for (size_t i = used; i < raw.size(); ++i) {
        if (raw[i] == '\xFF') continue;
        EXPECT(false) << "byte " << i - used << " past row " << row << " was overwritten";
        break;
      }
      std::vector<float> buffer(cols_);
      const float* loaded = LoadFloat(raw.data(), dtype_, 0, cols_, buffer.data());
      for (int64_t col = 0; col < cols_; ++col) values_[row * cols_ + col] = loaded[col];
      bits_.insert(bits_.end(), raw.begin(), raw.begin() + used);
    }
  }

  // The bytes of the rows as last downloaded.
  const std::vector<char>& bits() const { return bits_; }

 private:
  static constexpr int64_t kGuard = 16;  // elements checked after a row

  int64_t Guard(int64_t row) const {
    return row + 1 == rows_ ? kGuard : std::min(kGuard, stride_ - cols_);
  }
  char* RowPtr(int64_t row) const { return base_ + (offset_ + row * stride_) * DTypeSize(dtype_); }

  void Upload() {
    if (cols_ == 0) return;
    std::vector<float> row_values(cols_), rounded(cols_);
    std::vector<char> raw(cols_ * DTypeSize(dtype_));
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t col = 0; col < cols_; ++col) row_values[col] = static_cast<float>(At(row, col));
      StoreFloat(row_values.data(), cols_, raw.data(), dtype_, 0);
      const float* loaded = LoadFloat(raw.data(), dtype_, 0, cols_, rounded.data());
      for (int64_t col = 0; col < cols_; ++col) values_[row * cols_ + col] = loaded[col];
      CopyToDevice(RowPtr(row), raw.data(), raw.size());
    }
  }

  int64_t rows_, cols_, stride_, offset_;
  DType dtype_;
  char* base_;
  std::vector<double> values_;
  std::vector<char> bits_;
};

}  // namespace flashtrain::testing
