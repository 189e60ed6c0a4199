// A layer_norm problem on the device under test, and its fp64 reference.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "flashtrain/common/philox.h"
#include "flashtrain/common/test_memory.h"
#include "flashtrain/common/test_tensor.h"
#include "flashtrain/common/testing.h"
#include "flashtrain/layer_norm/layer_norm.h"

namespace flashtrain {

using testing::Layout;
using testing::RoundingError;
using testing::TestDevice;
using testing::TestTensor;

inline constexpr DType kF32 = DType::kFloat32, kF16 = DType::kFloat16, kBF16 = DType::kBFloat16;

struct Case {
  int64_t rows = 5, cols = 64;
  DType x0 = kF32, x = kF32, z = kF32, weight_dtype = kF32;
  bool residual = true, weight = true, bias = true, rms = false, zero_centered = false;
  bool rowscale = false, layerscale = false, dlayerscale = false;
  bool prenorm = true;  // dx is given and x is always written
  float dropout = 0.0f;
  Layout layout;  // of every [rows, cols] tensor

  std::string Name() const {
    return std::to_string(rows) + "x" + std::to_string(cols) + " x0=" + DTypeName(x0) +
           " x=" + DTypeName(x) + " z=" + DTypeName(z) + " w=" + DTypeName(weight_dtype) +
           (residual ? " residual" : "") + (rms ? " rms" : "") + (weight ? "" : " no-weight") +
           (bias ? "" : " no-bias") + (zero_centered ? " zero-centered" : "") +
           (rowscale ? " rowscale" : "") + (layerscale ? " layerscale" : "") +
           (dlayerscale ? " dlayerscale" : "") + (prenorm ? " prenorm" : "") +
           " dropout=" + std::to_string(dropout) + " padding=" + std::to_string(layout.padding) +
           " offset=" + std::to_string(layout.offset);
  }
};

inline constexpr uint64_t kSeed = 0x1234567890ABCDEF, kOffset = 0x100000004;
inline constexpr float kEpsilon = 1e-5f;

// A device array that is not a TestTensor.
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
        x0(c.rows, c.cols, c.x0, c.layout),
        residual(c.rows, c.cols, c.x, c.layout),
        z(c.rows, c.cols, c.z, c.layout),
        x(c.rows, c.cols, c.x, c.layout),
        dz(c.rows, c.cols, c.z, c.layout),
        dx(c.rows, c.cols, c.x, c.layout),
        dx0(c.rows, c.cols, c.x0, c.layout),
        dresidual(c.rows, c.cols, c.x, c.layout),
        weight(1, c.cols, c.weight_dtype),
        bias(1, c.cols, c.weight_dtype),
        layerscale(1, c.cols, c.weight_dtype),
        dweight(1, c.cols, c.weight_dtype),
        dbias(1, c.cols, c.weight_dtype),
        dlayerscale(1, c.cols, c.weight_dtype),
        rowscale(1, std::max<int64_t>(c.rows, 1), c.x0),
        mean(c.rows),
        rstd(c.rows),
        mask(c.rows * c.cols),
        rng_state(2) {
    std::mt19937_64 random(c.rows * 1000003 + c.cols);
    x0.FillNormal(random, 0.5, 1.0);
    residual.FillNormal(random, -0.25, 2.0);
    dz.FillNormal(random, 0.0, 1.0);
    dx.FillNormal(random, 0.0, 1.0);
    weight.FillNormal(random, c.zero_centered ? 0.0 : 1.0, 0.3);
    bias.FillNormal(random, 0.0, 0.3);
    layerscale.FillNormal(random, 0.5, 0.2);
    rowscale.FillNormal(random, 1.0, 0.5);
    const uint64_t state[2] = {kSeed, kOffset};
    testing::CopyToDevice(rng_state.data, state, sizeof(state));
  }

  LayerNormForwardParams ForwardParams() {
    LayerNormForwardParams p;
    p.rows = c.rows, p.cols = c.cols;
    p.x0 = x0.data(), p.x0_row_stride = x0.stride(), p.x0_dtype = c.x0;
    if (c.residual) p.residual = residual.data(), p.residual_row_stride = residual.stride();
    if (c.weight) p.weight = weight.data();
    if (c.bias) p.bias = bias.data();
    p.weight_dtype = c.weight_dtype;
    if (c.rowscale) p.rowscale = rowscale.data(), p.rowscale_dtype = rowscale.dtype();
    if (c.layerscale) p.layerscale = layerscale.data();
    if (c.dropout > 0) p.rng_state = rng_state.data, p.dropout_mask = mask.data;
    p.dropout_p = c.dropout, p.epsilon = kEpsilon;
    p.is_rms_norm = c.rms, p.zero_centered_weight = c.zero_centered;
    p.z = z.data(), p.z_row_stride = z.stride(), p.z_dtype = c.z;
    p.x = x.data(), p.x_row_stride = x.stride(), p.x_dtype = c.x;
    p.mean = c.rms ? nullptr : mean.data, p.rstd = rstd.data;
    return p;
  }

  LayerNormBackwardParams BackwardParams() {
    LayerNormBackwardParams p;
    p.rows = c.rows, p.cols = c.cols;
    p.dz = dz.data(), p.dz_row_stride = dz.stride(), p.z_dtype = c.z;
    if (c.prenorm) p.dx = dx.data(), p.dx_row_stride = dx.stride();
    p.x = x.data(), p.x_row_stride = x.stride(), p.x_dtype = c.x;
    p.x0_dtype = c.x0;
    if (c.dlayerscale) p.x0 = x0.data(), p.x0_row_stride = x0.stride();
    p.mean = c.rms ? nullptr : mean.data, p.rstd = rstd.data;
    if (c.weight) p.weight = weight.data(), p.dweight = dweight.data();
    p.weight_dtype = c.weight_dtype;
    if (c.rowscale) p.rowscale = rowscale.data(), p.rowscale_dtype = rowscale.dtype();
    if (c.layerscale) p.layerscale = layerscale.data();
    if (c.dropout > 0) p.rng_state = rng_state.data;
    p.dropout_p = c.dropout, p.is_rms_norm = c.rms, p.zero_centered_weight = c.zero_centered;
    p.dx0 = dx0.data(), p.dx0_row_stride = dx0.stride();
    p.dresidual = dresidual.data(), p.dresidual_row_stride = dresidual.stride();
    if (c.bias) p.dbias = dbias.data();
    if (c.dlayerscale) p.dlayerscale = dlayerscale.data();
    return p;
  }

  void Forward() {
    const Status status = LayerNormForward(ForwardParams(), TestDevice(), nullptr);
    EXPECT(status.ok()) << status.message();
    testing::Synchronize();
    z.Download();
    x.Download();
  }

  void Backward() {
    LayerNormBackwardParams p = BackwardParams();
    p.workspace_bytes = LayerNormBackwardWorkspaceBytes(p, TestDevice());
    EXPECT(p.workspace_bytes >= 0);
    const DeviceArray<float> workspace(p.workspace_bytes / sizeof(float) + 1);
    p.workspace = workspace.data;
    const Status status = LayerNormBackward(p, TestDevice(), nullptr);
    EXPECT(status.ok()) << status.message();
    testing::Synchronize();
    for (TestTensor* out : {&dx0, &dresidual, &dweight, &dbias, &dlayerscale}) out->Download();
  }

  Case c;
  TestTensor x0, residual, z, x, dz, dx, dx0, dresidual;
  TestTensor weight, bias, layerscale, dweight, dbias, dlayerscale, rowscale;
  DeviceArray<float> mean, rstd;
  DeviceArray<uint8_t> mask;
  DeviceArray<uint64_t> rng_state;
};

inline bool IsKept(float p, int64_t row, int64_t col) {
  const Philox4 random = PhiloxBlock(kSeed, kOffset, row, static_cast<uint32_t>(col / 4));
  return random.word[col % 4] >= DropoutThreshold(p);
}

// |actual - expected| is within the rounding of the dtype plus fp32 errors of terms of this size.
inline void ExpectNear(double actual, double expected, double magnitude, DType dtype,
                       const char* what, int64_t row, int64_t col) {
  const double subnormal = dtype == kF16 ? 6e-8 : 1e-30;
  const double tolerance =
      1.01 * RoundingError(dtype) * std::abs(expected) + 4e-6 * magnitude + subnormal;
  EXPECT(std::abs(actual - expected) <= tolerance)
      << what << "[" << row << ", " << col << "] is " << actual << ", not " << expected;
}

// The fp64 reference, row by row, and the comparison.
class Reference {
 public:
  explicit Reference(Problem& p) : p_(p), c_(p.c), x_(c_.cols), scale_(c_.cols) {}

  void CheckForward() {
    const std::vector<float> mean = p_.mean.Download(), rstd = p_.rstd.Download();
    const std::vector<uint8_t> mask = p_.mask.Download();
    for (int64_t row = 0; row < c_.rows; ++row) {
      ComputeRow(row);
      if (!c_.rms) ExpectNear(mean[row], mean_, 3.0, kF32, "mean", row, 0);
      ExpectNear(rstd[row], rstd_, 4 * rstd_, kF32, "rstd", row, 0);
      for (int64_t col = 0; col < c_.cols; ++col) {
        const double w = Weight(col), b = c_.bias ? p_.bias.At(0, col) : 0.0;
        const double x = p_.x.At(row, col);
        const double normed = (x - mean_) * rstd_;
        const double size = (std::abs(x) + std::abs(mean_)) * rstd_ * std::abs(w) + std::abs(b);
        ExpectNear(x, x_[col], std::abs(x_[col]) + 1, c_.x, "x", row, col);
        ExpectNear(p_.z.At(row, col), normed * w + b, size, c_.z, "z", row, col);
        if (c_.dropout > 0) {
          EXPECT(mask[row * c_.cols + col] == IsKept(c_.dropout, row, col))
              << "mask[" << row << ", " << col << "]";
        }
      }
    }
  }

  // Backward starts from the forward's own x, mean and rstd, as a caller's does.
  void CheckBackward() {
    const std::vector<float> mean = p_.mean.Download(), rstd = p_.rstd.Download();
    std::vector<double> dweight(c_.cols), dbias(c_.cols), dlayerscale(c_.cols);
    std::vector<double> dweight_size(c_.cols), dbias_size(c_.cols), dlayerscale_size(c_.cols);
    for (int64_t row = 0; row < c_.rows; ++row) {
      ComputeRow(row);
      mean_ = c_.rms ? 0.0 : mean[row];
      rstd_ = rstd[row];
      double c1 = 0, c2 = 0, size = 0;
      for (int64_t col = 0; col < c_.cols; ++col) {
        const double wdz = p_.dz.At(row, col) * Weight(col), xhat = Xhat(row, col);
        c1 += xhat * wdz / c_.cols;
        c2 += c_.rms ? 0.0 : wdz / c_.cols;
        size += (std::abs(xhat) + 1) * std::abs(wdz) / c_.cols;
      }
      for (int64_t col = 0; col < c_.cols; ++col) {
        const double dz = p_.dz.At(row, col), xhat = Xhat(row, col);
        const double dx = c_.prenorm ? p_.dx.At(row, col) : 0.0;
        const double g = rstd_ * (dz * Weight(col) - c2 - xhat * c1) + dx;
        const double g_size =
            rstd_ * (std::abs(dz * Weight(col)) + size * (1 + std::abs(xhat))) + std::abs(dx);
        const double ls = c_.layerscale ? p_.layerscale.At(0, col) : 1.0;
        ExpectNear(p_.dresidual.At(row, col), g, g_size, c_.x, "dresidual", row, col);
        ExpectNear(p_.dx0.At(row, col), g * scale_[col] * ls, g_size * std::abs(scale_[col] * ls),
                   c_.x0, "dx0", row, col);
        const double terms[3] = {dz * xhat, dz, g * scale_[col] * p_.x0.At(row, col)};
        dweight[col] += terms[0], dweight_size[col] += std::abs(terms[0]) + std::abs(dz);
        dbias[col] += terms[1], dbias_size[col] += std::abs(terms[1]);
        dlayerscale[col] += terms[2];
        dlayerscale_size[col] += g_size * std::abs(scale_[col] * p_.x0.At(row, col));
      }
    }
    if (c_.weight) CheckColumns(p_.dweight, dweight, dweight_size, "dweight");
    if (c_.bias) CheckColumns(p_.dbias, dbias, dbias_size, "dbias");
    if (c_.dlayerscale) CheckColumns(p_.dlayerscale, dlayerscale, dlayerscale_size, "dlayerscale");
  }

 private:
  double Weight(int64_t col) const {
    return (c_.weight ? p_.weight.At(0, col) : 1.0) + (c_.zero_centered ? 1.0 : 0.0);
  }

  double Xhat(int64_t row, int64_t col) const { return (p_.x.At(row, col) - mean_) * rstd_; }

  void CheckColumns(const TestTensor& actual, const std::vector<double>& expected,
                    const std::vector<double>& size, const char* what) {
    for (int64_t col = 0; col < c_.cols; ++col) {
      ExpectNear(actual.At(0, col), expected[col], size[col], c_.weight_dtype, what, 0, col);
    }
  }

  // x before rounding, the factor of x0 before layerscale, and the mean and rstd of the stored x.
  void ComputeRow(int64_t row) {
    double sum = 0, squares = 0;
    for (int64_t col = 0; col < c_.cols; ++col) {
      scale_[col] = c_.rowscale ? p_.rowscale.At(0, row) : 1.0;
      if (c_.dropout > 0) {
        scale_[col] *= IsKept(c_.dropout, row, col) ? 1.0 / (1.0 - c_.dropout) : 0.0;
      }
      x_[col] = p_.x0.At(row, col) * scale_[col];
      if (c_.layerscale) x_[col] *= p_.layerscale.At(0, col);
      if (c_.residual) x_[col] += p_.residual.At(row, col);
      sum += p_.x.At(row, col);
    }
    mean_ = c_.rms ? 0.0 : sum / c_.cols;
    for (int64_t col = 0; col < c_.cols; ++col) {
      const double centered = p_.x.At(row, col) - mean_;
      squares += centered * centered;
    }
    rstd_ = 1.0 / std::sqrt(squares / c_.cols + kEpsilon);
  }

  Problem& p_;
  const Case& c_;
  std::vector<double> x_, scale_;
  double mean_ = 0, rstd_ = 0;
};

}  // namespace flashtrain
