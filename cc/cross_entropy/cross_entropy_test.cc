// Drives cross_entropy.h on the device under test (CPU or CUDA, by what is linked) against fp64.
#include "flashtrain/cross_entropy/cross_entropy.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "flashtrain/common/parallel.h"
#include "flashtrain/common/test_memory.h"
#include "flashtrain/common/test_tensor.h"
#include "flashtrain/common/testing.h"
#include "flashtrain/cross_entropy/cross_entropy_test_problem.h"

namespace flashtrain {
namespace {

using testing::Scope;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

void Check(Problem& problem, bool at_once) {
  const Reference reference(problem);
  problem.Run(at_once);
  reference.CheckForward();
  reference.CheckBackward();
}

void CheckCase(const Case& c) {
  const Scope scope(c.Name());
  for (const bool at_once : {false, true}) {
    Problem problem(c);
    Check(problem, at_once);
  }
}

TEST(Sizes) {
  for (const int64_t cols : {1,   2,    3,    7,    8,     31,    32,    96,    255,   256,
                             257, 1000, 1023, 4096, 16384, 16385, 20000, 50257, 50304, 128256}) {
    for (const DType dtype : {kF32, kF16, kBF16}) {
      Case c;
      c.dtype = dtype, c.cols = cols;
      c.rows = cols < 1000 ? 37 : 5;
      CheckCase(c);
    }
  }
}

TEST(ManyRows) {
  for (const int64_t rows : {0, 1, 2, 1000, 4099}) {
    for (const int64_t cols : {10, 333}) {
      Case c;
      c.rows = rows, c.cols = cols, c.dtype = kBF16;
      CheckCase(c);
    }
  }
}

TEST(Options) {
  for (int bits = 0; bits < 128; ++bits) {
    Case c;
    c.cols = bits % 3 == 0 ? 100 : bits % 3 == 1 ? 1024 : 2055;
    c.dtype = bits % 2 ? kBF16 : kF32;
    c.smoothing = bits & 1 ? 0.1f : bits & 2 ? 1.0f : 0.0f;
    c.scale = bits & 4 ? 0.7f : 1.0f;
    c.z = bits & 8 ? 1e-2f : 0.0f;
    c.padding_cols = bits & 16 ? 47 : 0;
    c.label_type = bits & 32 ? LabelType::kInt32 : LabelType::kInt64;
    c.one_gradient = bits & 64;
    CheckCase(c);
  }
}

TEST(StridesAndAlignment) {
  for (const int64_t padding : {0, 1, 8, 1000}) {
    for (const int64_t offset : {0, 1, 4, 7}) {
      for (const DType dtype : {kF32, kBF16}) {
        Case c;
        c.cols = 1031, c.padding_cols = 6, c.dtype = dtype, c.smoothing = 0.2f;
        c.layout = {padding, offset};
        CheckCase(c);  // the gradient lies otherwise
        c.out_layout = c.layout;
        CheckCase(c);
      }
    }
  }
}

TEST(InPlace) {
  for (const int64_t cols : {5, 1000, 50257}) {
    for (const DType dtype : {kF32, kF16, kBF16}) {
      for (const bool at_once : {false, true}) {
        Case c;
        c.cols = cols, c.dtype = dtype, c.layout = c.out_layout = {3, 1};
        const Scope scope(c.Name());
        Problem separate(c), problem(c);
        separate.Run(at_once);
        CrossEntropyParams p = problem.WithGradient(problem.Params());
        p.dlogits = problem.logits.data(), p.dlogits_row_stride = problem.logits.stride();
        if (at_once) {
          Problem::ExpectOk(CrossEntropyForwardBackward(p, TestDevice(), nullptr));
        } else {
          problem.Forward();
          p.known_lse = problem.lse.data;
          Problem::ExpectOk(CrossEntropyBackward(p, TestDevice(), nullptr));
        }
        problem.logits.Download();
        EXPECT(problem.logits.bits() == separate.dlogits.bits()) << at_once;
        EXPECT(problem.losses.Download() == separate.losses.Download());
      }
    }
  }
}

// Rows further apart than 2^31 elements.
TEST(LargeOffsets) {
  Case c;
  c.rows = 3, c.cols = 512, c.dtype = kBF16;
  Problem problem(c);
  TestTensor logits(c.rows, c.cols, kBF16, {(int64_t{1} << 30) + 8, 0});
  std::mt19937_64 random(7);
  logits.FillNormal(random, 0, 1);
  CrossEntropyParams p = problem.WithGradient(problem.Params());
  p.logits = p.dlogits = logits.data();
  p.logits_row_stride = p.dlogits_row_stride = logits.stride();
  double sum = 0;
  for (int64_t col = 0; col < c.cols; ++col) sum += std::exp(logits.At(2, col));
  const double loss = std::log(sum) - logits.At(2, problem.labels[2]);
  Problem::ExpectOk(CrossEntropyForwardBackward(p, TestDevice(), nullptr));
  ExpectNear(problem.losses.Download()[2], loss, 1e-5 * loss, "loss", 2, 0);
  logits.Download();
  double total = 0, size = 0;
  for (int64_t col = 0; col < c.cols; ++col) {
    total += logits.At(2, col), size += std::abs(logits.At(2, col));
  }
  EXPECT(size > 0 && std::abs(total) < 1e-2 * size) << total << " of " << size;
}

TEST(LargeLogits) {
  for (const double stddev : {100.0, 10000.0}) {
    for (const float scale : {1.0f, 0.01f}) {
      Case c;
      c.rows = 9, c.cols = 1001, c.stddev = stddev, c.scale = scale;
      CheckCase(c);
    }
  }
}

// -inf in the first columns, in all of a thread's, in one, and in all but the label's.
TEST(MinusInfinityIsAClassOfProbabilityZero) {
  for (const int64_t cols : {7, 300, 20000}) {
    for (const DType dtype : {kF32, kBF16}) {
      Case c;
      c.rows = 4, c.cols = cols, c.dtype = dtype;
      Problem problem(c);
      problem.logits.Update([cols](int64_t row, int64_t col, double value) {
        const bool out[4] = {col < cols - 2, col % 2 == 1, col == 3, col != 2};
        return out[row] ? -kInf : value;
      });
      problem.labels = {cols - 1, 0, 0, 2};
      problem.UploadLabels();
      for (const bool at_once : {false, true}) Check(problem, at_once);
    }
  }
}

TEST(NonFiniteValuesStayInTheirRow) {
  for (const int64_t cols : {40, 5000}) {
    for (const double bad : {kNaN, kInf, -kInf}) {
      Case c;
      c.rows = 4, c.cols = cols, c.dtype = kBF16;
      Problem problem(c);
      problem.logits.Update([bad](int64_t row, int64_t col, double value) {
        return row == 1 && (bad == -kInf || col == 5) ? bad : value;
      });
      for (const bool at_once : {false, true}) {
        problem.Run(at_once);
        const std::vector<float> losses = problem.losses.Download();
        for (int64_t row = 0; row < 4; ++row) {
          EXPECT(std::isfinite(losses[row]) == (row != 1)) << row << " with " << bad;
          for (int64_t col = 0; col < cols; ++col) {
            EXPECT(std::isfinite(problem.dlogits.At(row, col)) == (row != 1)) << row << "," << col;
          }
        }
      }
    }
  }
}

TEST(PaddingIsNotRead) {
  Case c;
  c.cols = 100, c.padding_cols = 11;
  Problem problem(c);
  problem.logits.Update(
      [](int64_t, int64_t col, double value) { return col >= 89 ? kNaN : value; });
  Check(problem, true);
}

TEST(IgnoredRowsAreZeroWhateverTheyHold) {
  Case c;
  c.rows = 3, c.cols = 50, c.z = 0.1f, c.smoothing = 0.1f;
  Problem problem(c);
  problem.labels = {kIgnore, kIgnore, kIgnore};
  problem.UploadLabels();
  problem.logits.Set(1, 7, kNaN);
  for (const bool at_once : {false, true}) {
    problem.Run(at_once);
    for (int64_t row = 0; row < 3; ++row) {
      EXPECT(problem.losses.Download()[row] == 0 && problem.z_losses.Download()[row] == 0);
      for (int64_t col = 0; col < 50; ++col) EXPECT(problem.dlogits.At(row, col) == 0.0);
    }
  }
}

TEST(LabelOutOfRange) {
  for (const int64_t label : {int64_t{89}, int64_t{-1}, int64_t{1} << 40}) {
    Case c;
    c.rows = 3, c.cols = 100, c.padding_cols = 11;
    Problem problem(c);
    problem.labels[1] = label;
    problem.UploadLabels();
    const Status status =
        CrossEntropyForwardBackward(problem.WithGradient(problem.Params()), TestDevice(), nullptr);
    testing::Synchronize();
    const std::vector<float> losses = problem.losses.Download();
    problem.dlogits.Download();
    if (TestDevice().type == DeviceType::kCpu) {
      const std::string message = "CrossEntropyForwardBackward: labels[1] is " +
                                  std::to_string(label) + "; a label must be in [0, 89)";
      EXPECT(status.code() == StatusCode::kInvalidArgument);
      EXPECT(status.message().find(message) == 0) << status.message();
      EXPECT(std::isnan(losses[0])) << "something was written";
      continue;
    }
    EXPECT(status.ok());
    for (int64_t row = 0; row < 3; ++row) {
      EXPECT(std::isnan(losses[row]) == (row == 1)) << row;
      for (int64_t col = 0; col < 89; ++col) {
        EXPECT(std::isnan(problem.dlogits.At(row, col)) == (row == 1)) << row << ", " << col;
      }
    }
  }
}

// Two devices, each with some of the classes, and the second with padding.
TEST(Partial) {
  for (const int64_t cols : {64, 1000}) {
    Case c;
    c.rows = 8, c.cols = 2 * cols, c.padding_cols = 13, c.smoothing = 0.1f, c.z = 0.01f;
    Problem problem(c);
    const Reference reference(problem);
    std::vector<double> losses(c.rows), exp_sums(c.rows);
    const auto part = [&](int i) {
      CrossEntropyParams p = problem.WithGradient(problem.Params());
      p.cols = cols, p.first_class = i * cols;
      p.logits = static_cast<float*>(problem.logits.data()) + i * cols;
      p.dlogits = static_cast<float*>(problem.dlogits.data()) + i * cols;
      return p;
    };
    for (int i = 0; i < 2; ++i) {
      CrossEntropyParams p = part(i);
      p.partial = true, p.z_losses = nullptr;
      Problem::ExpectOk(CrossEntropyForward(p, TestDevice(), nullptr));
      const std::vector<float> loss = problem.losses.Download(), lse = problem.lse.Download();
      for (int64_t row = 0; row < c.rows; ++row) {
        losses[row] += loss[row], exp_sums[row] += std::exp(static_cast<double>(lse[row]));
      }
    }
    std::vector<float> total(c.rows), lses(c.rows), z_losses(c.rows);
    for (int64_t row = 0; row < c.rows; ++row) {
      if (problem.labels[row] == kIgnore) continue;
      const double lse = std::log(exp_sums[row]);
      lses[row] = lse, z_losses[row] = c.z * lse * lse;
      total[row] = losses[row] + lse + c.z * lse * lse;
    }
    problem.losses.Upload(total), problem.lse.Upload(lses), problem.z_losses.Upload(z_losses);
    reference.CheckForward();
    for (int i = 0; i < 2; ++i) {
      CrossEntropyParams p = part(i);
      p.known_lse = problem.lse.data;
      Problem::ExpectOk(CrossEntropyBackward(p, TestDevice(), nullptr));
    }
    problem.dlogits.Download();
    reference.CheckBackward();
  }
}

// A process whose columns are all padding.
TEST(NoClassesHere) {
  Case c;
  c.rows = 2, c.cols = 40;
  Problem problem(c);
  problem.labels = {3, 4};
  problem.UploadLabels();
  CrossEntropyParams p = problem.WithGradient(problem.Params());
  p.num_classes = 50, p.first_class = 50, p.partial = true, p.z_losses = nullptr;
  Problem::ExpectOk(CrossEntropyForward(p, TestDevice(), nullptr));
  EXPECT(problem.lse.Download()[0] == -kInf && problem.losses.Download()[0] == 0.0f);
  problem.lse.Upload({1.0f, 2.0f});
  p.known_lse = problem.lse.data;
  Problem::ExpectOk(CrossEntropyBackward(p, TestDevice(), nullptr));
  problem.dlogits.Download();
  for (int64_t col = 0; col < c.cols; ++col) EXPECT(problem.dlogits.At(1, col) == 0.0);
}

TEST(KnownLogSumExp) {
  Case c;
  c.rows = 6, c.cols = 500, c.z = 0.1f;
  Problem first(c), problem(c);
  const Reference reference(problem);
  first.Forward();
  problem.lse.Upload(first.lse.Download());
  CrossEntropyParams p = problem.Params();
  p.known_lse = first.lse.data, p.lse = nullptr;
  Problem::ExpectOk(CrossEntropyForward(p, TestDevice(), nullptr));
  reference.CheckForward();
}

TEST(BitwiseDeterministic) {
  Case c;
  c.rows = 100, c.cols = 3001, c.dtype = kBF16;
  Problem problem(c);
  SetNumThreads(1);
  problem.ForwardBackward();
  const std::vector<char> dlogits = problem.dlogits.bits();
  const std::vector<float> losses = problem.losses.Download();
  for (const int threads : {2, 3, 4}) {
    SetNumThreads(threads);
    problem.ForwardBackward();
    EXPECT(problem.dlogits.bits() == dlogits && problem.losses.Download() == losses) << threads;
  }
}

template <typename Function, typename Change>
void ExpectError(Function function, const std::string& expected, Change change) {
  const Case c;
  Problem problem(c);
  CrossEntropyParams p = problem.WithGradient(problem.Params());
  change(p);
  const Status status = function(p, TestDevice(), nullptr);
  EXPECT(status.code() == StatusCode::kInvalidArgument) << "no error about " << expected;
  EXPECT(status.message().find(expected) == 0) << status.message();
}

TEST(ErrorsNameTheArgument) {
  using P = CrossEntropyParams;
  const auto forward = [](const std::string& expected, auto change) {
    ExpectError(CrossEntropyForward, "CrossEntropyForward: " + expected, change);
  };
  const auto backward = [](const std::string& expected, auto change) {
    ExpectError(CrossEntropyBackward, "CrossEntropyBackward: " + expected, change);
  };
  const auto at_once = [](const std::string& expected, auto change) {
    ExpectError(CrossEntropyForwardBackward, "CrossEntropyForwardBackward: " + expected, change);
  };
  forward("rows is -1; it must be at least 0", [](P& p) { p.rows = -1; });
  forward("cols is 0; it must be at least 1", [](P& p) { p.cols = 0; });
  forward("num_classes is 0;", [](P& p) { p.num_classes = 0; });
  forward("first_class is -1;", [](P& p) { p.first_class = -1; });
  forward("first_class is 0 and num_classes 65; losses that are not partial need all classes",
          [](P& p) { p.num_classes = 65; });
  forward("dtype is unknown dtype (9)", [](P& p) { p.dtype = static_cast<DType>(9); });
  forward("label_type is 7; supported: kInt64 (0), kInt32 (1)",
          [](P& p) { p.label_type = static_cast<LabelType>(7); });
  forward("label_smoothing is 1.5", [](P& p) { p.label_smoothing = 1.5f; });
  forward("label_smoothing is nan", [](P& p) { p.label_smoothing = std::nanf(""); });
  forward("logit_scale is 0.0", [](P& p) { p.logit_scale = 0.0f; });
  forward("lse_square_scale is -1", [](P& p) { p.lse_square_scale = -1.0f; });
  forward("logits is null", [](P& p) { p.logits = nullptr; });
  forward("labels is null", [](P& p) { p.labels = nullptr; });
  forward("losses is null", [](P& p) { p.losses = nullptr; });
  forward("logits_row_stride is 63; it must be at least cols = 64",
          [](P& p) { p.logits_row_stride = 63; });
  forward("label_smoothing is 0.5", [](P& p) { p.known_lse = p.lse, p.label_smoothing = 0.5f; });
  forward("z_losses must be null for partial losses", [](P& p) { p.partial = true; });
  backward("known_lse is null", [](P&) {});
  backward("dlosses is null", [](P& p) { p.known_lse = p.lse, p.dlosses = nullptr; });
  backward("dlosses_stride is -1", [](P& p) { p.known_lse = p.lse, p.dlosses_stride = -1; });
  backward("dlogits is null", [](P& p) { p.known_lse = p.lse, p.dlogits = nullptr; });
  backward("dlogits_row_stride is 1;", [](P& p) { p.known_lse = p.lse, p.dlogits_row_stride = 1; });
  backward("dlogits_row_stride is 65; in place it must be logits_row_stride = 64", [](P& p) {
    p.known_lse = p.lse, p.dlogits = const_cast<void*>(p.logits), p.dlogits_row_stride = 65;
  });
  at_once("known_lse must be null", [](P& p) { p.known_lse = p.lse; });
  at_once("partial is true", [](P& p) { p.partial = true, p.z_losses = nullptr; });
}

}  // namespace
}  // namespace flashtrain
