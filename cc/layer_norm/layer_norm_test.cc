// Drives layer_norm.h on the device under test (CPU or CUDA, by what is linked) against fp64.
#include "flashtrain/layer_norm/layer_norm.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "flashtrain/common/parallel.h"
#include "flashtrain/common/philox.h"
#include "flashtrain/common/test_memory.h"
#include "flashtrain/common/test_tensor.h"
#include "flashtrain/common/testing.h"
#include "flashtrain/layer_norm/layer_norm_test_problem.h"

namespace flashtrain {
namespace {

using testing::IsSmallRun;
using testing::Scope;

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
    if (IsSmallRun() && rows > 1000) continue;
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
  for (int bits = 0; bits < 512; bits += IsSmallRun() ? 11 : 1) {
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
  c.rows = IsSmallRun() ? 64 : 512, c.cols = 2048, c.residual = false;
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
  const uint64_t states[2][2] = {{kSeed + 1, kOffset}, {kSeed, kOffset + 1}};
  for (const auto& state : states) {
    testing::CopyToDevice(problem.rng_state.data, state, sizeof(state));
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
    c.rows = IsSmallRun() ? 300 : 3000, c.cols = cols, c.dropout = 0.1f;
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
