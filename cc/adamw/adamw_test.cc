// Drives adamw.h on the device under test (CPU or CUDA, by what is linked) against fp64.
#include "flashtrain/adamw/adamw.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "flashtrain/adamw/adamw_test_problem.h"
#include "flashtrain/common/parallel.h"
#include "flashtrain/common/test_memory.h"
#include "flashtrain/common/test_tensor.h"
#include "flashtrain/common/testing.h"

namespace flashtrain {
namespace {

std::vector<Spec> ManySpecs() {
  std::vector<Spec> specs;
  for (const int64_t numel :
       {0, 1, 2, 3, 4, 5, 7, 255, 1000, 4096, 0, 16383, 16384, 16385, 40003}) {
    Spec spec;
    spec.numel = numel, spec.group = numel % 2;
    specs.push_back(spec);
  }
  for (const DType param : {kF32, kF16, kBF16}) {
    for (const DType grad : {kF32, kF16, kBF16}) {
      for (const bool master : {false, true}) {
        if (master && param == kF32) continue;
        for (const int64_t offset : {0, 1}) {
          specs.push_back({1037, param, grad, master, 1, offset});
        }
      }
    }
  }
  return specs;
}

TEST(FollowsTheFormula) {
  for (const bool remember : {true, false}) {
    Problem problem(ManySpecs());
    problem.remember = remember;
    for (int step = 0; step < 4; ++step) {
      problem.NewGradients(step % 2 ? 1.0 : 0.01);
      problem.groups[1].lr *= 0.9;
      problem.Step();
      problem.Reference();
      problem.Check();
    }
  }
}

TEST(MissingGradientsLeaveTensorsAlone) {
  Problem problem({{100}, {20000}, {33, kBF16, kBF16, true}});
  for (int step = 0; step < 4; ++step) {
    problem.tensors[step % 3]->spec.has_grad = false;
    problem.NewGradients(1.0);
    problem.Step();
    problem.Reference();
    problem.Check();
    problem.tensors[step % 3]->spec.has_grad = true;
  }
}

// Elements that somebody has written since the last step move from where they are; the others keep
// their masters, down to the bits.
TEST(FollowsWrittenParameters) {
  std::vector<Spec> specs;
  for (const DType param : {kF16, kBF16}) {
    for (const DType grad : {kF32, kF16, kBF16}) {
      for (const int64_t offset : {0, 1}) specs.push_back({5003, param, grad, true, 1, offset});
    }
  }
  Problem problem(specs);
  for (int step = 0; step < 4; ++step) {
    problem.NewGradients(1.0);
    problem.Step();
    problem.Reference();
    problem.Check();
    for (auto& t : problem.tensors) {
      t->param.Update([&](int64_t, int64_t i, double value) {
        const bool writes = i < 2000 ? i % 3 == step % 3 : i % 1009 == 0;
        const double written = i % 2 ? -0.375 : 2.5;
        if (!writes || value == written) return value;
        return t->p[i] = written;
      });
    }
  }
}

TEST(NotANumberStaysWhereItIs) {
  for (const DType param : {kF16, kBF16}) {
    Problem problem({{1001, param, param, true}});
    Tensor& t = *problem.tensors[0];
    problem.NewGradients(1.0);
    t.param.Set(0, 10, NAN);
    t.grad.Set(0, 20, NAN);
    for (int step = 0; step < 3; ++step) {
      problem.Step();
      for (int64_t i = 0; i < 1001; ++i) {
        const bool bad = i == 10 || i == 20;
        EXPECT(std::isnan(t.param.At(0, i)) == bad && std::isnan(t.master.At(0, i)) == bad) << i;
      }
    }
  }
}

TEST(ScalesAndClips) {
  Problem problem({{1000}, {333, kBF16, kBF16, true, 1}, {70, kF16, kF16, true}});
  DeviceScalar<float> scale(1024.0f), norm(0.0f), lr(0.05f);
  AdamWParams scalars;
  scalars.grad_scale = scale.data(), scalars.grad_norm = norm.data();
  for (const double scaled_norm : {2048.0, 512.0, 1e6, 0.0}) {
    for (const double max_norm : {0.5, 1.0, kInf}) {
      problem.NewGradients(100.0);
      norm.Set(static_cast<float>(scaled_norm));
      scalars.max_norm = max_norm;
      problem.Step(scalars);
      problem.Reference(std::min(1.0, max_norm / (scaled_norm / 1024 + 1e-6)) / 1024);
      problem.Check();
    }
  }
  problem.groups[0].lr_on_device = problem.groups[1].lr_on_device = lr.data();
  problem.NewGradients(1.0);
  problem.Step();
  problem.groups[0].lr = problem.groups[1].lr = 0.05;
  problem.Reference();
  problem.Check();
}

TEST(SkipsOnTheDevice) {
  Problem problem(ManySpecs());
  DeviceScalar<float> norm(0.0f), skip(0.0f), scale(1.0f);
  DeviceScalar<int64_t> skipped(5);
  AdamWParams scalars;
  scalars.grad_norm = norm.data(), scalars.skip = skip.data(), scalars.grad_scale = scale.data();
  scalars.skipped_steps = skipped.data();
  problem.NewGradients(1.0);
  problem.Step(scalars);
  problem.Reference();
  EXPECT(skipped.Get() == 5);
  const struct {
    float norm, skip, scale;
  } bad[] = {{INFINITY, 0.0f, 1.0f}, {NAN, 0.0f, 1.0f},      {1.0f, 1.0f, 1.0f}, {1.0f, NAN, 1.0f},
             {1.0f, 0.0f, 0.0f},     {1.0f, 0.0f, INFINITY}, {1.0f, 0.0f, NAN}};
  for (int i = 0; i < 7; ++i) {
    norm.Set(bad[i].norm), skip.Set(bad[i].skip), scale.Set(bad[i].scale);
    for (auto& t : problem.tensors) t->grad.FillNormal(problem.random, NAN, 1.0);
    problem.Step(scalars);
    EXPECT(skipped.Get() == 6 + i);
    problem.Check();
  }
  norm.Set(1.0f), skip.Set(0.0f), scale.Set(1.0f);
  problem.NewGradients(1.0);
  problem.Step(scalars);
  problem.Reference();
  problem.Check();
}

TEST(ManyTensorsAndGroups) {
  std::vector<Spec> specs(3000);
  for (size_t i = 0; i < specs.size(); ++i) specs[i].numel = i % 7, specs[i].group = i % 100;
  Problem problem(specs);
  problem.groups.resize(100, problem.groups[1]);
  for (int i = 0; i < 100; ++i) problem.groups[i].lr = 1e-3 * i;
  for (int step = 0; step < 2; ++step) {
    problem.NewGradients(1.0);
    problem.Step();
    problem.Reference();
    problem.Check();
  }
}

TEST(BitwiseDeterministic) {
  std::vector<char> first;
  for (const int threads : {1, 2, 3}) {
    SetNumThreads(threads);
    Problem problem({{100003}, {5, kBF16, kBF16, true}, {70000, kBF16, kF32, true}});
    for (int step = 0; step < 3; ++step) {
      problem.NewGradients(1.0);
      problem.Step();
    }
    std::vector<char> bits;
    for (auto& t : problem.tensors) {
      for (TestTensor* part : {&t->param, &t->exp_avg, &t->exp_avg_sq}) {
        bits.insert(bits.end(), part->bits().begin(), part->bits().end());
      }
    }
    if (first.empty()) first = bits;
    EXPECT(bits == first) << threads;
  }
}

TEST(NoTensors) {
  AdamWParams p;
  EXPECT(AdamWStep(p, TestDevice(), nullptr).ok());
}

// --- Norm ----------------------------------------------------------------------------------------

float Norm(const std::vector<std::unique_ptr<TestTensor>>& grads,
           const std::vector<int64_t>& numel) {
  std::vector<GradNormTensor> tensors;
  for (size_t i = 0; i < grads.size(); ++i) {
    tensors.push_back({grads[i]->data(), grads[i]->dtype(), numel[i]});
  }
  DeviceScalar<float> norm(NAN);
  GradNormParams p;
  p.tensors = tensors.data(), p.num_tensors = static_cast<int64_t>(tensors.size());
  p.norm = norm.data();
  p.workspace_bytes = GradNormWorkspaceBytes(p);
  p.workspace = testing::Allocate(p.workspace_bytes + 16);
  const Status status = GradNorm(p, TestDevice(), nullptr);
  EXPECT(status.ok()) << status.message();
  testing::Synchronize();
  testing::Free(p.workspace);
  return norm.Get();
}

struct Gradients {
  void Add(int64_t size, DType dtype, int64_t offset, double scale) {
    numel.push_back(size);
    tensors.push_back(std::make_unique<TestTensor>(1, size, dtype, Layout{0, offset}));
    tensors.back()->FillNormal(random, 0, scale);
  }
  double Exact() const {
    double sum = 0;
    for (size_t i = 0; i < numel.size(); ++i) {
      for (int64_t k = 0; k < numel[i]; ++k) sum += std::pow(tensors[i]->At(0, k), 2);
    }
    return std::sqrt(sum);
  }
  void Check() const {
    const double exact = Exact(), actual = Norm(tensors, numel);
    EXPECT(std::abs(actual - exact) <= 3e-7 * exact) << actual << ", not " << exact;
    EXPECT(Norm(tensors, numel) == static_cast<float>(actual)) << "not the same bits";
  }
  std::mt19937_64 random{3};
  std::vector<int64_t> numel;
  std::vector<std::unique_ptr<TestTensor>> tensors;
};

TEST(NormOfAllGradients) {
  Gradients none;
  EXPECT(Norm(none.tensors, none.numel) == 0.0f);
  for (const DType dtype : {kF32, kF16, kBF16}) {
    for (const int64_t size : {0, 1, 3, 8, 9, 1000, 32768, 32769, 200001}) {
      for (const int64_t offset : {0, 1}) {
        Gradients one;
        one.Add(size, dtype, offset, 3.0);
        const Scope scope(std::to_string(size) + " of " + DTypeName(dtype));
        one.Check();
      }
    }
  }
  Gradients many;
  for (int i = 0; i < 2500; ++i) many.Add(i % 5, i % 2 ? kF32 : kBF16, 0, 1.0 + i % 3);
  many.Add(100000, kF16, 0, 10.0);
  many.Check();
}

TEST(NormIsNotFiniteWhereAnElementIsNot) {
  for (const double bad : {kInf, -kInf, static_cast<double>(NAN)}) {
    for (const int64_t at : {0, 40000, 70000}) {
      Gradients gradients;
      gradients.Add(100, kF32, 0, 1.0);
      gradients.Add(70001, kBF16, 0, 1.0);
      gradients.tensors[1]->Set(0, at, bad);
      EXPECT(!std::isfinite(Norm(gradients.tensors, gradients.numel))) << bad << " at " << at;
    }
  }
}

// --- Errors --------------------------------------------------------------------------------------

template <typename Change>
void ExpectError(const std::string& expected, Change change) {
  Problem problem({{10}, {20, kBF16, kBF16, true}});
  problem.NewGradients(1.0);
  AdamWParams p = problem.Params();
  change(p, problem.records, problem.groups);
  const Status status = AdamWStep(p, TestDevice(), nullptr);
  EXPECT(status.code() == StatusCode::kInvalidArgument) << "no error about " << expected;
  EXPECT(status.message().find("AdamWStep: " + expected) == 0) << status.message();
}

TEST(ErrorsNameTheArgument) {
  using P = AdamWParams;
  using T = std::vector<AdamWTensor>;
  using G = std::vector<AdamWGroup>;
  ExpectError("num_tensors is -1", [](P& p, T&, G&) { p.num_tensors = -1; });
  ExpectError("num_groups is 0; it must be at least 1", [](P& p, T&, G&) { p.num_groups = 0; });
  ExpectError("tensors[1].numel is -5", [](P&, T& t, G&) { t[1].numel = -5; });
  ExpectError("tensors[0].param is null", [](P&, T& t, G&) { t[0].param = nullptr; });
  ExpectError("tensors[0].step is null", [](P&, T& t, G&) { t[0].step = nullptr; });
  ExpectError("tensors[0].exp_avg is null", [](P&, T& t, G&) { t[0].exp_avg = nullptr; });
  ExpectError("tensors[0].exp_avg_sq is null", [](P&, T& t, G&) { t[0].exp_avg_sq = nullptr; });
  ExpectError("tensors[0].group is 2; it must be from 0 to 1",
              [](P&, T& t, G&) { t[0].group = 2; });
  ExpectError("tensors[0].master must be null for float32 parameters",
              [](P&, T& t, G&) { t[0].master = t[0].exp_avg; });
  ExpectError("tensors[0].grad_dtype is unknown dtype (7)",
              [](P&, T& t, G&) { t[0].grad_dtype = static_cast<DType>(7); });
  ExpectError("groups[1].beta1 is 1.0", [](P&, T&, G& g) { g[1].beta1 = 1.0; });
  ExpectError("groups[0].beta2 is -0.1", [](P&, T&, G& g) { g[0].beta2 = -0.1; });
  ExpectError("groups[0].lr is nan", [](P&, T&, G& g) { g[0].lr = NAN; });
  ExpectError("groups[0].eps is inf", [](P&, T&, G& g) { g[0].eps = kInf; });
  ExpectError("groups[0].lr is 9", [](P&, T&, G& g) { g[0].lr = 1e39; });
  ExpectError("groups[0].weight_decay is -1", [](P&, T&, G& g) { g[0].weight_decay = -1; });
  ExpectError("max_norm is 0.0", [](P& p, T&, G&) { p.max_norm = 0.0; });
  ExpectError("grad_norm is null", [](P& p, T&, G&) { p.max_norm = 1.0; });
  if (TestDevice().type == DeviceType::kCuda) {
    ExpectError("table is null or of", [](P& p, T&, G&) { p.table_bytes = 8; });
  }
}

TEST(NormErrorsNameTheArgument) {
  float norm = 0;
  GradNormTensor tensor;
  tensor.numel = 5;
  GradNormParams p;
  p.tensors = &tensor, p.num_tensors = 1;
  EXPECT(GradNorm(p, TestDevice(), nullptr).message() ==
         "GradNorm: norm is null; it is required for the result");
  p.norm = &norm;
  EXPECT(GradNorm(p, TestDevice(), nullptr).message().find("GradNorm: tensors[0].grad is null") ==
         0);
  tensor.grad = &norm;
  EXPECT(GradNorm(p, TestDevice(), nullptr).message() ==
         "GradNorm: workspace_bytes is 0; GradNormWorkspaceBytes asks for 8");
}

}  // namespace
}  // namespace flashtrain
