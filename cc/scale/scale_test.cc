// Drives scale.h on the device under test (CPU or CUDA, by what is linked).
#include "flashtrain/scale/scale.h"

#include <cmath>
#include <cstdint>
#include <random>
#include <string>

#include "flashtrain/common/test_memory.h"
#include "flashtrain/common/test_tensor.h"
#include "flashtrain/common/testing.h"

namespace flashtrain {
namespace {

using testing::Layout;
using testing::TestDevice;
using testing::TestTensor;

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

struct Problem {
  Problem(int64_t count, DType x_dtype, DType y_dtype, int64_t offset = 0)
      : x(1, count, x_dtype, {0, offset}),
        y(1, count, y_dtype, {0, offset}),
        factor(1, 1, DType::kFloat32) {
    std::mt19937_64 random(count);
    x.FillNormal(random, 0, 1);
    factor.FillNormal(random, 3, 1);
    p.count = count, p.factor = static_cast<const float*>(factor.data());
    p.x = x.data(), p.x_dtype = x_dtype, p.y = y.data(), p.y_dtype = y_dtype;
  }

  void RunAndCheck(TestTensor& out) {
    const Status status = Scale(p, TestDevice(), nullptr);
    EXPECT(status.ok()) << status.message();
    testing::Synchronize();
    std::vector<double> expected(p.count);
    for (int64_t i = 0; i < p.count; ++i) expected[i] = x.At(0, i) * factor.At(0, 0);
    out.Download();
    for (int64_t i = 0; i < p.count; ++i) {
      const double tolerance = 1.01 * testing::RoundingError(p.y_dtype) * std::abs(expected[i]);
      EXPECT(std::abs(out.At(0, i) - expected[i]) <= tolerance + 6e-8)
          << "y[" << i << "] is " << out.At(0, i) << ", not " << expected[i];
    }
  }

  TestTensor x, y, factor;
  ScaleParams p;
};

TEST(SizesAndDTypes) {
  for (const int64_t count : {1, 3, 4, 1023, 4096, 100003}) {
    for (const DType x : kDTypes) {
      for (const DType y : kDTypes) {
        for (const int64_t offset : {0, 1}) {
          Problem problem(count, x, y, offset);
          problem.RunAndCheck(problem.y);
        }
      }
    }
  }
}

TEST(InPlace) {
  for (const DType dtype : kDTypes) {
    Problem problem(5000, dtype, dtype);
    problem.p.y = problem.x.data();
    problem.RunAndCheck(problem.x);
  }
}

TEST(NothingToDo) { EXPECT(Scale(ScaleParams(), TestDevice(), nullptr).ok()); }

template <typename Change>
void ExpectError(const std::string& expected, Change change) {
  Problem problem(8, DType::kFloat32, DType::kFloat32);
  change(problem.p);
  const Status status = Scale(problem.p, TestDevice(), nullptr);
  EXPECT(status.code() == StatusCode::kInvalidArgument) << "no error about " << expected;
  EXPECT(status.message().find("Scale: " + expected) == 0) << status.message();
}

TEST(ErrorsNameTheArgument) {
  using P = ScaleParams;
  ExpectError("count is -1; it must be at least 0", [](P& p) { p.count = -1; });
  ExpectError("factor is null", [](P& p) { p.factor = nullptr; });
  ExpectError("x is null", [](P& p) { p.x = nullptr; });
  ExpectError("y is null", [](P& p) { p.y = nullptr; });
  ExpectError("x_dtype is unknown dtype (9)", [](P& p) { p.x_dtype = static_cast<DType>(9); });
  ExpectError("y_dtype is bfloat16; in place it must be x_dtype = float32",
              [](P& p) { p.y = const_cast<void*>(p.x), p.y_dtype = DType::kBFloat16; });
}

}  // namespace
}  // namespace flashtrain
