// Drives layer_norm.h on the device under test (CPU or CUDA, by what is linked) against fp64.
#include "flashtrain/layer_norm/layer_norm.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "flashtrain/common/parallel.h"
#include "flashtrain/common/philox.h"
#include "flashtrain/common/test_memory.h"
#include "flashtrain/common/test_tensor.h"
#include "flashtrain/common/testing.h"

namespace flashtrain {
namespace {

using testing::Layout;
using testing::RoundingError;
using testing::Scope;
using testing::TestDevice;
using testing::TestTensor;

constexpr DType kF32 = DType::kFloat32, kF16 = DType::kFloat16, kBF16 = DType::kBFloat16;

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

constexpr uint64_t kSeed = 0x1234567890ABCDEF, kOffset = 0x100000004;
constexpr float kEpsilon = 1e-5f;

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

bool IsKept(float p, int64_t row, int64_t col) {
  const Philox4 random = PhiloxBlock(kSeed, kOffset, row, static_cast<uint32_t>(col / 4));
  return random.word[col % 4] >= DropoutThreshold(p);
}

// |actual - expected| is within the rounding of the dtype plus fp32 errors of terms of this size.
void ExpectNear(double actual, double expected, double magnitude, DType dtype, const char* what,
                int64_t row, int64_t col) {
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
        const double normed = (x_[col] - mean_) * rstd_;
        const double size =
            (std::abs(x_[col]) + std::abs(mean_)) * rstd_ * std::abs(w) + std::abs(b);
        ExpectNear(p_.x.At(row, col), x_[col], std::abs(x_[col]) + 1, c_.x, "x", row, col);
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

  // x, the factor of x0 before layerscale, mean and rstd of a row.
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
      sum += x_[col];
    }
    mean_ = c_.rms ? 0.0 : sum / c_.cols;
    for (const double x : x_) squares += (x - mean_) * (x - mean_);
    rstd_ = 1.0 / std::sqrt(squares / c_.cols + kEpsilon);
  }

  Problem& p_;
  const Case& c_;
  std::vector<double> x_, scale_;
  double mean_ = 0, rstd_ = 0;
};

void CheckCase(const Case& c) {
  const Scope scope(c.Name());
  Problem problem(c);
  Reference reference(problem);
  problem.Forward();
  reference.CheckForward();
  problem.Backward();
  reference.CheckBackward();
}

// The dtype combinations of training: uniform, low-precision activations with fp32 residual stream
// or weights, and outputs of another dtype.
std::vector<Case> DTypeCases() {
  std::vector<Case> cases;
  for (const DType low : {kF32, kF16, kBF16}) {
    for (const DType x : {low, kF32}) {
      for (const DType weight : {low, kF32}) {
        for (const DType z : {low, kF32}) {
          Case c;
          c.x0 = low, c.x = x, c.weight_dtype = weight, c.z = z;
          cases.push_back(c);
          if (low == kF32) break;
        }
        if (low == kF32) break;
      }
      if (low == kF32) break;
    }
  }
  Case autocast;  // fp32 in, bf16 out
  autocast.z = kBF16;
  cases.push_back(autocast);
  return cases;
}

TEST(Sizes) {
  for (const int64_t cols :
       {1,    2,    3,    7,    8,    31,   32,   96,   255,   256,   257,   768,  1000,
        1023, 1600, 2048, 2056, 4096, 5120, 8192, 8200, 12288, 16384, 16385, 20000}) {
    for (const DType dtype : {kF32, kBF16}) {
      Case c;
      c.x0 = c.x = c.z = c.weight_dtype = dtype;
      c.cols = cols;
      c.rows = cols < 1000 ? 37 : 3;
      CheckCase(c);
    }
  }
}

TEST(ManyRows) {
  for (const int64_t rows : {1, 2, 1000, 4099}) {
    for (const int64_t cols : {24, 100, 768}) {
      Case c;
      c.rows = rows, c.cols = cols;
      c.x0 = c.x = c.z = kBF16;
      CheckCase(c);
      c.rms = true, c.bias = false;
      CheckCase(c);
    }
  }
}

TEST(DTypes) {
  for (Case c : DTypeCases()) {
    for (const int64_t cols : {768, 1001, 3072}) {
      c.cols = cols;
      CheckCase(c);
    }
  }
}

TEST(Options) {
  for (int bits = 0; bits < 512; ++bits) {
    Case c;
    c.cols = bits % 3 == 0 ? 100 : bits % 3 == 1 ? 1024 : 515;
    c.x0 = bits % 2 ? kBF16 : kF32;
    c.z = c.x0;
    c.residual = bits & 1;
    c.rms = bits & 2;
    c.weight = bits & 4;
    c.zero_centered = c.weight && (bits & 8);
    c.bias = bits & 16;
    c.rowscale = bits & 32;
    c.layerscale = bits & 64;
    c.dlayerscale = c.layerscale && (bits & 2);
    c.dropout = bits & 128 ? 0.3f : 0.0f;
    c.prenorm = bits & 256;
    CheckCase(c);
  }
}

TEST(StridesAndAlignment) {
  for (const int64_t padding : {0, 1, 8, 1000}) {
    for (const int64_t offset : {0, 1, 4, 8}) {
      Case c;
      c.cols = 264;
      c.x0 = c.z = kBF16;
      c.layout.padding = padding, c.layout.offset = offset;
      CheckCase(c);
      c.x = kBF16;
      CheckCase(c);
    }
  }
}

// Rows further apart than 2^31 elements.
TEST(LargeOffsets) {
  for (const int64_t cols : {512, 511}) {
    Case c;
    c.rows = 3, c.cols = cols;
    c.x0 = c.x = kBF16;
    Problem problem(c);
    TestTensor x0(c.rows, cols, kBF16, {(int64_t{1} << 30) + 8, 0});
    std::mt19937_64 random(7);
    x0.FillNormal(random, 0, 1);
    LayerNormForwardParams p = problem.ForwardParams();
    p.x0 = x0.data(), p.x0_row_stride = x0.stride();
    EXPECT(LayerNormForward(p, TestDevice(), nullptr).ok());
    testing::Synchronize();
    problem.x.Download();
    for (int64_t col = 0; col < cols; ++col) {
      const double x = x0.At(2, col) + problem.residual.At(2, col);
      ExpectNear(problem.x.At(2, col), x, std::abs(x) + 1, kBF16, "x", 2, col);
    }
  }
}

TEST(ZeroRowsGiveZeroWeightGradients) {
  for (const int64_t cols : {3, 768}) {
    Case c;
    c.rows = 0, c.cols = cols;
    Problem problem(c);
    problem.Forward();
    problem.Backward();
    for (int64_t col = 0; col < cols; ++col) {
      EXPECT(problem.dweight.At(0, col) == 0.0 && problem.dbias.At(0, col) == 0.0);
    }
  }
}

TEST(NonFiniteValuesStayInTheirRow) {
  for (const int64_t cols : {768, 333}) {
    for (const double bad :
         {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
      Case c;
      c.rows = 4, c.cols = cols, c.x0 = c.x = c.z = kBF16;
      Problem problem(c);
      problem.x0.Set(1, 5, bad);
      problem.Forward();
      problem.Backward();
      for (int64_t row = 0; row < 4; ++row) {
        for (int64_t col = 0; col < cols; ++col) {
          const bool finite = row != 1;
          EXPECT(std::isfinite(problem.z.At(row, col)) == finite) << row << ", " << col;
          EXPECT(std::isfinite(problem.dresidual.At(row, col)) == finite) << row << ", " << col;
        }
      }
      EXPECT(std::isnan(problem.dweight.At(0, 0)));
      EXPECT(std::isfinite(problem.dbias.At(0, 0)));
    }
  }
}

// A large mean beside a small variance: E[x^2] - E[x]^2 in fp32 would lose it.
TEST(VarianceIsTakenAroundTheMean) {
  for (const int64_t cols : {1024, 1023}) {
    Case c;
    c.cols = cols, c.residual = false;
    Problem problem(c);
    std::mt19937_64 random(3);
    problem.x0.FillNormal(random, 4000.0, 1.0);
    problem.Forward();
    const std::vector<float> rstd = problem.rstd.Download();
    for (int64_t row = 0; row < c.rows; ++row) {
      double sum = 0, squares = 0;
      for (int64_t col = 0; col < cols; ++col) sum += problem.x0.At(row, col) / cols;
      for (int64_t col = 0; col < cols; ++col)
        squares += std::pow(problem.x0.At(row, col) - sum, 2);
      const double expected = 1 / std::sqrt(squares / cols + kEpsilon);
      EXPECT(std::abs(rstd[row] / expected - 1) < 1e-4) << rstd[row] << " not " << expected;
    }
  }
}

TEST(DropoutStatistics) {
  Case c;
  c.rows = 512, c.cols = 2048, c.residual = false;
  for (const float p : {0.1f, 0.5f, 0.9f}) {
    c.dropout = p;
    Problem problem(c);
    problem.Forward();
    const std::vector<uint8_t> mask = problem.mask.Download();
    const double n = static_cast<double>(mask.size()), keep = 1.0 - p;
    double kept = 0, both_in_column = 0;
    for (size_t i = 0; i < mask.size(); ++i) {
      EXPECT(mask[i] <= 1);
      kept += mask[i];
      both_in_column += mask[i] * mask[(i + c.cols) % mask.size()];
    }
    const double sigma = std::sqrt(n * keep * (1 - keep));
    EXPECT(std::abs(kept - n * keep) < 5 * sigma) << kept / n << " kept, not " << keep;
    EXPECT(std::abs(both_in_column - n * keep * keep) < 8 * sigma) << both_in_column / n;
  }
}

TEST(DropoutDependsOnSeedAndOffset) {
  Case c;
  c.rows = 64, c.cols = 256, c.dropout = 0.5f;
  Problem problem(c);
  problem.Forward();
  const std::vector<uint8_t> first = problem.mask.Download();
  for (const uint64_t* state :
       {(const uint64_t[2]){kSeed + 1, kOffset}, (const uint64_t[2]){kSeed, kOffset + 1}}) {
    testing::CopyToDevice(problem.rng_state.data, state, 2 * sizeof(uint64_t));
    problem.Forward();
    const std::vector<uint8_t> other = problem.mask.Download();
    int64_t same = 0;
    for (size_t i = 0; i < first.size(); ++i) same += first[i] == other[i];
    EXPECT(std::abs(same - 8192) < 5 * 64) << same;
  }
}

TEST(BackwardIsBitwiseDeterministic) {
  for (const int64_t cols : {768, 1001}) {
    Case c;
    c.rows = 3000, c.cols = cols, c.dropout = 0.1f;
    Problem problem(c);
    SetNumThreads(1);
    problem.Forward();
    problem.Backward();
    const std::vector<char> dweight = problem.dweight.bits(), dbias = problem.dbias.bits();
    for (const int threads : {2, 3, 4}) {
      SetNumThreads(threads);
      problem.Backward();
      EXPECT(problem.dweight.bits() == dweight && problem.dbias.bits() == dbias) << threads;
    }
  }
}

TEST(UnwantedOutputsAreNotWritten) {
  for (const int64_t cols : {768, 333}) {
    Case c;
    c.cols = cols;
    Problem problem(c);
    LayerNormForwardParams f = problem.ForwardParams();
    f.x = nullptr, f.mean = nullptr, f.rstd = nullptr;
    EXPECT(LayerNormForward(f, TestDevice(), nullptr).ok());
    problem.Forward();
    LayerNormBackwardParams b = problem.BackwardParams();
    b.dx0 = nullptr, b.dweight = nullptr, b.dbias = nullptr;
    EXPECT(LayerNormBackwardWorkspaceBytes(b, TestDevice()) == 0);
    EXPECT(LayerNormBackward(b, TestDevice(), nullptr).ok());
    testing::Synchronize();
    for (TestTensor* tensor : {&problem.dx0, &problem.dweight, &problem.dbias}) {
      tensor->Download();
      EXPECT(std::isnan(tensor->At(0, 0)));
    }
    problem.dresidual.Download();
    EXPECT(std::isfinite(problem.dresidual.At(0, 0)));
  }
}

void ExpectError(const Status& status, const std::string& expected) {
  EXPECT(status.code() == StatusCode::kInvalidArgument) << "no error about " << expected;
  EXPECT(status.message().find(expected) != std::string::npos) << status.message();
}

template <typename Change>
void ExpectForwardError(const std::string& expected, Change change) {
  const Case c;
  Problem problem(c);
  LayerNormForwardParams p = problem.ForwardParams();
  change(p);
  ExpectError(LayerNormForward(p, TestDevice(), nullptr), "LayerNormForward: " + expected);
}

template <typename Change>
void ExpectBackwardError(const std::string& expected, Change change) {
  const Case c;
  Problem problem(c);
  LayerNormBackwardParams p = problem.BackwardParams();
  change(p);
  ExpectError(LayerNormBackward(p, TestDevice(), nullptr), "LayerNormBackward: " + expected);
}

TEST(ErrorsNameTheArgument) {
  using F = LayerNormForwardParams;
  ExpectForwardError("rows is -1; it must be at least 0", [](F& p) { p.rows = -1; });
  ExpectForwardError("cols is 0; it must be at least 1", [](F& p) { p.cols = 0; });
  ExpectForwardError("x0 is null", [](F& p) { p.x0 = nullptr; });
  ExpectForwardError("z is null", [](F& p) { p.z = nullptr; });
  ExpectForwardError("x0_row_stride is 63; it must be at least cols = 64",
                     [](F& p) { p.x0_row_stride = 63; });
  ExpectForwardError("z_row_stride is -64", [](F& p) { p.z_row_stride = -64; });
  ExpectForwardError("x_dtype (of residual and x) is bfloat16 (2); supported here: float32",
                     [](F& p) { p.x_dtype = kBF16; });
  ExpectForwardError("x0_dtype is unknown dtype (9)",
                     [](F& p) { p.x0_dtype = static_cast<DType>(9); });
  ExpectForwardError("dropout_p is 1.0", [](F& p) { p.dropout_p = 1.0f; });
  ExpectForwardError("dropout_p is nan", [](F& p) { p.dropout_p = std::nanf(""); });
  ExpectForwardError("rng_state is null", [](F& p) { p.dropout_p = 0.5f; });
  ExpectForwardError("mean must be null for RMSNorm", [](F& p) { p.is_rms_norm = true; });
  ExpectForwardError("weight is null", [](F& p) {
    p.weight = nullptr;
    p.zero_centered_weight = true;
  });
  ExpectForwardError("epsilon is -1", [](F& p) { p.epsilon = -1.0f; });
  using B = LayerNormBackwardParams;
  ExpectBackwardError("dz is null", [](B& p) { p.dz = nullptr; });
  ExpectBackwardError("x is null", [](B& p) { p.x = nullptr; });
  ExpectBackwardError("mean is null", [](B& p) { p.mean = nullptr; });
  ExpectBackwardError("rstd is null", [](B& p) { p.rstd = nullptr; });
  ExpectBackwardError("weight is null", [](B& p) { p.weight = nullptr; });
  ExpectBackwardError("layerscale is null", [](B& p) { p.dlayerscale = p.dweight; });
  ExpectBackwardError("dx_row_stride is 1;", [](B& p) { p.dx_row_stride = 1; });
  ExpectBackwardError("workspace_bytes is 0; LayerNormBackwardWorkspaceBytes asks for", [](B&) {});
  ExpectBackwardError("workspace is null", [](B& p) { p.workspace_bytes = 1 << 30; });
  ExpectBackwardError("workspace is not aligned", [](B& p) {
    p.workspace_bytes = 1 << 30;
    p.workspace = reinterpret_cast<void*>(uintptr_t{8});
  });
}

}  // namespace
}  // namespace flashtrain
