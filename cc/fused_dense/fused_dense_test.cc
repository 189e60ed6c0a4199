// Drives the passes of fused_dense.h on the device under test (CPU or CUDA, by what is linked)
// against fp64.
#include "flashtrain/fused_dense/fused_dense.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "flashtrain/common/parallel.h"
#include "flashtrain/common/test_memory.h"
#include "flashtrain/common/test_tensor.h"
#include "flashtrain/common/testing.h"

namespace flashtrain {
namespace {

using testing::Allocate;
using testing::Free;
using testing::Layout;
using testing::RoundingError;
using testing::Scope;
using testing::TestDevice;
using testing::TestTensor;

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
constexpr Activation kActivations[] = {Activation::kIdentity, Activation::kGeluApprox,
                                       Activation::kRelu, Activation::kSquaredRelu};
const double kNan = std::numeric_limits<double>::quiet_NaN();
const double kInf = std::numeric_limits<double>::infinity();

double Activate(Activation activation, double x) {
  switch (activation) {
    case Activation::kGeluApprox:
      return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::kRelu:
      return x <= 0 ? 0.0 : x;
    case Activation::kSquaredRelu:
      return x <= 0 ? 0.0 : x * x;
    default:
      return x;
  }
}

double Derivative(Activation activation, double x) {
  switch (activation) {
    case Activation::kGeluApprox: {
      const double c = std::sqrt(2.0 / M_PI);
      const double t = std::tanh(c * (x + 0.044715 * x * x * x));
      return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * c * (1.0 + 3.0 * 0.044715 * x * x);
    }
    case Activation::kRelu:
      return x <= 0 ? 0.0 : 1.0;
    case Activation::kSquaredRelu:
      return x <= 0 ? 0.0 : 2.0 * x;
    default:
      return 1.0;
  }
}

struct Case {
  int64_t rows = 7, cols = 96;
  DType dtype = DType::kBFloat16;
  Activation activation = Activation::kGeluApprox;
  bool bias = true, pre_act = true, out = true, dx = true, dbias = true, in_place = false;
  int64_t offset = 0;

  std::string Name() const {
    std::ostringstream s;
    s << rows << " x " << cols << " " << DTypeName(dtype) << " activation "
      << static_cast<int>(activation) << " bias " << bias << " pre_act " << pre_act << " out "
      << out << " dx " << dx << " dbias " << dbias << " in place " << in_place << " offset "
      << offset;
    return s.str();
  }
};

// fp32 arithmetic, then one rounding: some units of fp32 (the exponential multiplies those of its
// argument) beside half a unit of the dtype.
void ExpectClose(const char* name, const TestTensor& got, int64_t row, int64_t col, double expected,
                 double scale) {
  const double value = got.At(row, col);
  const double bound =
      (RoundingError(got.dtype()) + 4e-6) * (std::abs(expected) + scale * 1e-2) + scale * 2e-6;
  const bool close = std::abs(value - expected) <= bound;
  if (!close)
    EXPECT(close) << name << "[" << row << ", " << col << "] " << value << " != " << expected;
}

void CheckForward(const Case& c) {
  const Scope scope("forward " + c.Name());
  std::mt19937_64 random(1);
  const Layout layout{0, c.offset};
  TestTensor x(c.rows, c.cols, c.dtype, layout), bias(1, c.cols, c.dtype, layout);
  TestTensor pre_act(c.rows, c.cols, c.dtype, layout), out(c.rows, c.cols, c.dtype, layout);
  x.FillNormal(random, 0.0, 2.0);
  bias.FillNormal(random, 0.5, 1.0);
  std::vector<double> values;
  for (int64_t row = 0; row < c.rows; ++row) {
    for (int64_t col = 0; col < c.cols; ++col) values.push_back(x.At(row, col));
  }
  TestTensor& pre = c.in_place ? x : pre_act;
  DenseActivationForwardParams p;
  p.rows = c.rows, p.cols = c.cols, p.dtype = c.dtype, p.activation = c.activation;
  p.x = x.data(), p.bias = c.bias ? bias.data() : nullptr;
  p.pre_act = c.pre_act ? pre.data() : nullptr, p.out = c.out ? out.data() : nullptr;
  const Status status = DenseActivationForward(p, TestDevice(), nullptr);
  EXPECT(status.ok()) << status.message();
  testing::Synchronize();
  if (c.pre_act) pre.Download();
  if (c.out) out.Download();
  for (int64_t row = 0; row < c.rows; ++row) {
    for (int64_t col = 0; col < c.cols; ++col) {
      double expected = values[row * c.cols + col] + (c.bias ? bias.At(0, col) : 0.0);
      if (c.pre_act) {
        ExpectClose("pre_act", pre, row, col, expected, 1.0);
        expected = pre.At(row, col);  // what the activation saw
        if (c.out) ExpectClose("out", out, row, col, Activate(c.activation, expected), 1.0);
      } else if (!c.bias) {
        ExpectClose("out", out, row, col, Activate(c.activation, expected), 1.0);
      }
    }
  }
}

void CheckBackward(const Case& c) {
  const Scope scope("backward " + c.Name());
  std::mt19937_64 random(2);
  const Layout layout{0, c.offset};
  const bool identity = c.activation == Activation::kIdentity;
  TestTensor dout(c.rows, c.cols, c.dtype, layout), pre_act(c.rows, c.cols, c.dtype, layout);
  TestTensor dx(c.rows, c.cols, c.dtype, layout), dbias(1, c.cols, c.dtype, layout);
  dout.FillNormal(random, 0.1, 1.0);
  pre_act.FillNormal(random, 0.0, 2.0);
  if (c.rows > 0) pre_act.Set(0, 0, 0.0);
  std::vector<double> grads;
  for (int64_t row = 0; row < c.rows; ++row) {
    for (int64_t col = 0; col < c.cols; ++col) grads.push_back(dout.At(row, col));
  }
  DenseActivationBackwardParams p;
  p.rows = c.rows, p.cols = c.cols, p.dtype = c.dtype, p.activation = c.activation;
  p.dout = dout.data(), p.pre_act = identity ? nullptr : pre_act.data();
  TestTensor& result = c.in_place ? dout : dx;
  p.dx = c.dx ? result.data() : nullptr;
  p.dbias = c.dbias ? dbias.data() : nullptr;
  p.workspace_bytes = DenseActivationBackwardWorkspaceBytes(p, TestDevice());
  EXPECT(p.workspace_bytes >= 0);
  p.workspace = Allocate(p.workspace_bytes);
  const Status status = DenseActivationBackward(p, TestDevice(), nullptr);
  EXPECT(status.ok()) << status.message();
  testing::Synchronize();
  Free(p.workspace);
  if (c.dx) result.Download();
  if (c.dbias) dbias.Download();
  for (int64_t col = 0; col < c.cols; ++col) {
    double sum = 0.0, magnitude = 1.0;
    for (int64_t row = 0; row < c.rows; ++row) {
      const double x = pre_act.At(row, col);
      const double expected = grads[row * c.cols + col] * Derivative(c.activation, x);
      sum += expected, magnitude += std::abs(expected);
      if (c.dx) ExpectClose("dx", result, row, col, expected, 2.0);
    }
    if (c.dbias) ExpectClose("dbias", dbias, 0, col, sum, magnitude);
  }
}

void CheckCase(const Case& c) {
  CheckForward(c);
  CheckBackward(c);
}

TEST(Sizes) {
  for (const DType dtype : kDTypes) {
    for (const int64_t rows : {0, 1, 3, 130}) {
      for (const int64_t cols : {1, 2, 7, 8, 31, 64, 192, 513, 768, 3000}) {
        Case c;
        c.rows = rows, c.cols = cols, c.dtype = dtype;
        CheckCase(c);
      }
    }
  }
}

TEST(Options) {
  for (const DType dtype : kDTypes) {
    for (const Activation activation : kActivations) {
      for (int bits = 0; bits < 16; ++bits) {
        Case c;
        c.rows = 9, c.cols = bits % 3 == 0 ? 33 : 264, c.dtype = dtype, c.activation = activation;
        c.bias = bits & 1, c.pre_act = bits & 2, c.out = !c.pre_act || (bits & 4);
        c.in_place = bits & 8, c.dx = !(bits & 2), c.dbias = bits & 1 || !c.dx;
        CheckCase(c);
      }
    }
  }
}

TEST(ManyRowsAndColumns) {
  Case c;
  c.rows = 5000, c.cols = 40;
  CheckCase(c);
  c.dtype = DType::kFloat32;
  CheckCase(c);
  c.rows = 3, c.cols = 100000;
  CheckCase(c);
}

TEST(Alignment) {
  for (const int64_t offset : {1, 4, 8}) {
    Case c;
    c.offset = offset;
    CheckCase(c);
  }
}

TEST(NanAndInfinityPropagate) {
  for (const Activation activation : kActivations) {
    TestTensor x(1, 8, DType::kFloat32), out(1, 8, DType::kFloat32), dx(1, 8, DType::kFloat32);
    TestTensor ones(1, 8, DType::kFloat32);
    std::mt19937_64 random(3);
    x.FillNormal(random, 0.0, 1.0);
    ones.FillNormal(random, 1.0, 0.0);
    x.Set(0, 1, kNan), x.Set(0, 2, kInf), x.Set(0, 3, 1e30), x.Set(0, 4, -50.0);
    DenseActivationForwardParams p;
    p.rows = 1, p.cols = 8, p.activation = activation, p.x = x.data(), p.out = out.data();
    EXPECT(DenseActivationForward(p, TestDevice(), nullptr).ok());
    testing::Synchronize();
    out.Download();
    EXPECT(std::isnan(out.At(0, 1)));
    EXPECT(out.At(0, 2) == kInf);
    EXPECT(out.At(0, 3) > 9e29);
    if (activation != Activation::kIdentity) EXPECT(std::abs(out.At(0, 4)) < 1e-20);
    for (const int64_t col : {0, 5, 6, 7}) EXPECT(std::isfinite(out.At(0, col)));

    ones.Set(0, 0, kNan);
    DenseActivationBackwardParams b;
    b.rows = 1, b.cols = 8, b.activation = activation, b.dout = ones.data(), b.dx = dx.data();
    if (activation != Activation::kIdentity) b.pre_act = out.data();
    EXPECT(DenseActivationBackward(b, TestDevice(), nullptr).ok());
    testing::Synchronize();
    dx.Download();
    // ReLU passes nothing on where it was off, whatever arrives, as in torch.
    const bool off = out.At(0, 0) <= 0.0 && activation != Activation::kGeluApprox &&
                     activation != Activation::kIdentity;
    EXPECT(off ? dx.At(0, 0) == 0.0 : std::isnan(dx.At(0, 0)));
    for (const int64_t col : {5, 6, 7}) EXPECT(std::isfinite(dx.At(0, col)));
  }
}

TEST(SameBitsTwiceAndForAnyNumberOfThreads) {
  std::vector<char> first;
  const int threads = GetNumThreads();
  for (const int n : {1, 2, 3, 2}) {
    SetNumThreads(n);
    std::mt19937_64 random(4);
    TestTensor dout(3001, 72, DType::kBFloat16), dbias(1, 72, DType::kBFloat16);
    dout.FillNormal(random, 0.0, 1.0);
    DenseActivationBackwardParams p;
    p.rows = 3001, p.cols = 72, p.dtype = DType::kBFloat16;
    p.dout = dout.data(), p.dbias = dbias.data();
    p.workspace_bytes = DenseActivationBackwardWorkspaceBytes(p, TestDevice());
    p.workspace = Allocate(p.workspace_bytes);
    EXPECT(DenseActivationBackward(p, TestDevice(), nullptr).ok());
    testing::Synchronize();
    Free(p.workspace);
    dbias.Download();
    if (first.empty()) first = dbias.bits();
    EXPECT(dbias.bits() == first) << n << " threads";
  }
  SetNumThreads(threads);
}

template <typename Params>
Status Call(const Params& p) {
  if constexpr (std::is_same_v<Params, DenseActivationForwardParams>) {
    return DenseActivationForward(p, TestDevice(), nullptr);
  } else {
    return DenseActivationBackward(p, TestDevice(), nullptr);
  }
}

template <typename Params, typename Change>
void ExpectRefused(const Params& good, Change change, const std::string& message) {
  Params p = good;
  change(p);
  const Status status = Call(p);
  EXPECT(status.code() == StatusCode::kInvalidArgument);
  EXPECT(status.message().find(message) != std::string::npos) << status.message();
}

TEST(Errors) {
  TestTensor x(2, 8, DType::kFloat32), y(2, 8, DType::kFloat32);
  using Forward = DenseActivationForwardParams;
  using Backward = DenseActivationBackwardParams;
  Forward f;
  f.rows = 2, f.cols = 8, f.x = x.data(), f.out = y.data();
  ExpectRefused(f, [](Forward& p) { p.rows = -1; }, "rows is -1; it must be at least 0");
  ExpectRefused(f, [](Forward& p) { p.cols = 0; }, "cols is 0");
  ExpectRefused(f, [](Forward& p) { p.dtype = static_cast<DType>(9); }, "dtype is");
  ExpectRefused(
      f, [](Forward& p) { p.activation = static_cast<Activation>(7); }, "activation is 7");
  ExpectRefused(f, [](Forward& p) { p.x = nullptr; }, "x is null");
  ExpectRefused(f, [](Forward& p) { p.out = nullptr; }, "out is null");
  ExpectRefused(f, [](Forward& p) { p.pre_act = p.out; }, "pre_act and out are the same memory");
  Backward b;
  b.rows = 2, b.cols = 8, b.dout = x.data(), b.dx = y.data();
  ExpectRefused(b, [](Backward& p) { p.dout = nullptr; }, "dout is null");
  ExpectRefused(b, [](Backward& p) { p.activation = Activation::kRelu; }, "pre_act is null");
  ExpectRefused(b, [](Backward& p) { p.dbias = p.dx; }, "workspace_bytes is 0");
}

}  // namespace
}  // namespace flashtrain
