// A cross_entropy problem on the device under test, and its fp64 reference.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "flashtrain/common/test_memory.h"
#include "flashtrain/common/test_tensor.h"
#include "flashtrain/common/testing.h"
#include "flashtrain/cross_entropy/cross_entropy.h"

namespace flashtrain {

using testing::Layout;
using testing::RoundingError;
using testing::TestDevice;
using testing::TestTensor;

inline constexpr DType kF32 = DType::kFloat32, kF16 = DType::kFloat16, kBF16 = DType::kBFloat16;
inline constexpr int64_t kIgnore = -100;

struct Case {
  int64_t rows = 5, cols = 64;
  int64_t padding_cols = 0;  // of cols, not classes
  DType dtype = kF32;
  LabelType label_type = LabelType::kInt64;
  float smoothing = 0.0f, scale = 1.0f, z = 0.0f;
  bool one_gradient = false;  // dlosses has stride 0
  double stddev = 2.0;        // of the logits
  Layout layout;              // of logits
  Layout out_layout;          // of dlogits

  std::string Name() const {
    return std::to_string(rows) + "x" + std::to_string(cols) + "-" + std::to_string(padding_cols) +
           " " + DTypeName(dtype) + (label_type == LabelType::kInt32 ? " int32" : "") +
           " smoothing=" + std::to_string(smoothing) + " scale=" + std::to_string(scale) +
           " z=" + std::to_string(z) + (one_gradient ? " one-gradient" : "") +
           " padding=" + std::to_string(layout.padding) + "," + std::to_string(out_layout.padding) +
           " offset=" + std::to_string(layout.offset) + "," + std::to_string(out_layout.offset);
  }
};

// A device array; an output is poisoned with NaN bits.
template <typename T>
struct DeviceArray {
  explicit DeviceArray(int64_t count) : count(count) {
    data = static_cast<T*>(testing::Allocate((count + 1) * sizeof(T)));
    const std::vector<char> poison(count * sizeof(T), '\xFF');
    testing::CopyToDevice(data, poison.data(), poison.size());
  }
  ~DeviceArray() { testing::Free(data); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  void Upload(const std::vector<T>& host) {
    testing::CopyToDevice(data, host.data(), count * sizeof(T));
  }
  std::vector<T> Download() const {
    std::vector<T> host(count);
    testing::CopyToHost(host.data(), data, count * sizeof(T));
    return host;
  }

  T* data;
  int64_t count;
};

// All tensors of a case, and the calls.
struct Problem {
  explicit Problem(const Case& c)
      : c(c),
        logits(c.rows, c.cols, c.dtype, c.layout),
        dlogits(c.rows, c.cols, c.dtype, c.out_layout),
        labels(c.rows),
        labels64(c.rows),
        labels32(c.rows),
        losses(c.rows),
        lse(c.rows),
        z_losses(c.rows),
        dlosses(c.rows) {
    std::mt19937_64 random(c.rows * 1000003 + c.cols);
    logits.FillNormal(random, 0.5, c.stddev);
    std::uniform_int_distribution<int64_t> any_class(0, num_classes() - 1);
    for (int64_t row = 0; row < c.rows; ++row) {
      labels[row] = row % 4 == 3 ? kIgnore : any_class(random);
    }
    if (c.rows > 1) labels[0] = 0, labels[1] = num_classes() - 1;
    UploadLabels();
    std::normal_distribution<float> normal;
    dlosses_host.resize(c.rows);
    for (float& value : dlosses_host) value = normal(random);
    dlosses.Upload(dlosses_host);
  }

  int64_t num_classes() const { return c.cols - c.padding_cols; }

  void UploadLabels() {
    labels64.Upload(labels);
    labels32.Upload(std::vector<int32_t>(labels.begin(), labels.end()));
  }

  CrossEntropyParams Params() {
    CrossEntropyParams p;
    p.rows = c.rows, p.cols = c.cols, p.num_classes = num_classes();
    p.logits = logits.data(), p.logits_row_stride = logits.stride(), p.dtype = c.dtype;
    p.label_type = c.label_type;
    p.labels = labels64.data;
    if (c.label_type == LabelType::kInt32) p.labels = labels32.data;
    p.label_smoothing = c.smoothing, p.logit_scale = c.scale, p.lse_square_scale = c.z;
    p.losses = losses.data, p.lse = lse.data, p.z_losses = z_losses.data;
    return p;
  }

  CrossEntropyParams WithGradient(CrossEntropyParams p) {
    p.dlosses = dlosses.data, p.dlosses_stride = c.one_gradient ? 0 : 1;
    p.dlogits = dlogits.data(), p.dlogits_row_stride = dlogits.stride();
    return p;
  }

  static void ExpectOk(const Status& status) {
    EXPECT(status.ok()) << status.message();
    testing::Synchronize();
  }

  void Forward() { ExpectOk(CrossEntropyForward(Params(), TestDevice(), nullptr)); }

  void Backward() {
    CrossEntropyParams p = WithGradient(Params());
    p.known_lse = lse.data;
    ExpectOk(CrossEntropyBackward(p, TestDevice(), nullptr));
    dlogits.Download();
  }

  void ForwardBackward() {
    ExpectOk(CrossEntropyForwardBackward(WithGradient(Params()), TestDevice(), nullptr));
    dlogits.Download();
  }

  void Run(bool at_once) {
    if (at_once) return ForwardBackward();
    Forward();
    Backward();
  }

  double Gradient(int64_t row) const { return dlosses_host[c.one_gradient ? 0 : row]; }

  Case c;
  TestTensor logits, dlogits;
  std::vector<int64_t> labels;
  DeviceArray<int64_t> labels64;
  DeviceArray<int32_t> labels32;
  DeviceArray<float> losses, lse, z_losses, dlosses;
  std::vector<float> dlosses_host;
};

inline void ExpectNear(double actual, double expected, double tolerance, const char* what,
                       int64_t row, int64_t col) {
  EXPECT(std::abs(actual - expected) <= tolerance)
      << what << "[" << row << ", " << col << "] is " << actual << ", not " << expected;
}

// The fp64 results of one row, from the logits as they were when this was made.
class Reference {
 public:
  explicit Reference(const Problem& problem) : p_(problem), c_(problem.c) {
    for (int64_t row = 0; row < c_.rows; ++row) {
      for (int64_t col = 0; col < c_.cols; ++col) x_.push_back(p_.logits.At(row, col) * c_.scale);
    }
  }

  double Lse(int64_t row) const {
    double max = -std::numeric_limits<double>::infinity(), sum = 0;
    for (int64_t col = 0; col < p_.num_classes(); ++col) max = std::max(max, X(row, col));
    for (int64_t col = 0; col < p_.num_classes(); ++col) sum += std::exp(X(row, col) - max);
    return max + std::log(sum);
  }

  // The rule of kernels: rtol 1e-5, atol 1e-6, of the terms that a loss is made of.
  void CheckForward() const {
    const std::vector<float> losses = p_.losses.Download(), lses = p_.lse.Download();
    const std::vector<float> z_losses = p_.z_losses.Download();
    for (int64_t row = 0; row < c_.rows; ++row) {
      double lse = 0, loss = 0, size = 0;
      if (p_.labels[row] != kIgnore) {
        double sum = 0;
        for (int64_t col = 0; col < p_.num_classes() && c_.smoothing > 0; ++col) {
          sum += X(row, col);
        }
        lse = Lse(row);
        const double x_label = X(row, p_.labels[row]);
        loss = lse - (1.0 - c_.smoothing) * x_label - c_.smoothing / p_.num_classes() * sum +
               c_.z * lse * lse;
        size = std::max(std::abs(loss), 0.1 * (std::abs(lse) + std::abs(x_label)));
      }
      ExpectNear(losses[row], loss, 1e-5 * size + 1e-6, "loss", row, 0);
      ExpectNear(lses[row], lse, 1e-5 * std::abs(lse) + 1e-6, "lse", row, 0);
      ExpectNear(z_losses[row], c_.z * lse * lse, 1e-5 * c_.z * lse * lse, "z_loss", row, 0);
    }
  }

  void CheckBackward() const {
    for (int64_t row = 0; row < c_.rows; ++row) {
      const bool ignored = p_.labels[row] == kIgnore;
      const double lse = Lse(row), g = ignored ? 0.0 : p_.Gradient(row) * c_.scale;
      for (int64_t col = 0; col < c_.cols; ++col) {
        double expected = 0, size = 0;
        if (col < p_.num_classes()) {
          const double softmax = std::exp(X(row, col) - lse) * (1 + 2 * c_.z * lse);
          const double target =
              (col == p_.labels[row] ? 1.0 - c_.smoothing : 0.0) + c_.smoothing / p_.num_classes();
          expected = g * (softmax - target);
          size = std::abs(g) * (std::abs(softmax) + target);
        }
        // Rounding the log-sum-exp to fp32 is a relative error of the softmax.
        size *= 1e-5 + 2 * RoundingError(kF32) * std::abs(lse);
        const double subnormal = c_.dtype == kF16 ? 6e-8 : 1e-30;
        ExpectNear(p_.dlogits.At(row, col), expected,
                   1.01 * RoundingError(c_.dtype) * std::abs(expected) + size + subnormal,
                   "dlogits", row, col);
      }
    }
  }

 private:
  double X(int64_t row, int64_t col) const { return x_[row * c_.cols + col]; }

  const Problem& p_;
  const Case& c_;
  std::vector<double> x_;
};

}  // namespace flashtrain
