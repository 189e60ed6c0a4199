// An AdamW problem on the device under test, and the same in fp64.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "flashtrain/adamw/adamw.h"
#include "flashtrain/common/test_memory.h"
#include "flashtrain/common/test_tensor.h"
#include "flashtrain/common/testing.h"

namespace flashtrain {

using testing::Layout;
using testing::RoundingError;
using testing::Scope;
using testing::TestDevice;
using testing::TestTensor;

inline constexpr DType kF32 = DType::kFloat32, kF16 = DType::kFloat16, kBF16 = DType::kBFloat16;
inline constexpr double kInf = std::numeric_limits<double>::infinity();

// One element on the device.
template <typename T>
class DeviceScalar {
 public:
  explicit DeviceScalar(T value) : data_(static_cast<T*>(testing::Allocate(sizeof(T)))) {
    Set(value);
  }
  ~DeviceScalar() { testing::Free(data_); }
  DeviceScalar(const DeviceScalar&) = delete;
  DeviceScalar& operator=(const DeviceScalar&) = delete;
  void Set(T value) { testing::CopyToDevice(data_, &value, sizeof(T)); }
  T Get() const {
    T value;
    testing::CopyToHost(&value, data_, sizeof(T));
    return value;
  }
  T* data() { return data_; }

 private:
  T* data_;
};

struct Spec {
  int64_t numel = 1000;
  DType param = kF32, grad = kF32;
  bool master = false;
  int64_t group = 0;
  int64_t offset = 0;  // elements before each array: alignment
  bool has_grad = true;
};

// A parameter, its state on the device, and the same in fp64.
struct Tensor {
  Tensor(const Spec& spec, std::mt19937_64& random)
      : spec(spec),
        param(1, spec.numel, spec.param, Layout{0, spec.offset}),
        master(1, spec.numel, kF32, Layout{0, spec.offset}),
        grad(1, spec.numel, spec.grad, Layout{0, spec.offset}),
        exp_avg(1, spec.numel, kF32, Layout{0, spec.offset}),
        exp_avg_sq(1, spec.numel, kF32, Layout{0, spec.offset}),
        step(0.0f) {
    param.FillNormal(random, 0, 1);
    master.FillNormal(random, 0, 0);
    exp_avg.FillNormal(random, 0, 0);
    exp_avg_sq.FillNormal(random, 0, 0);
    for (int64_t i = 0; i < spec.numel; ++i) p.push_back(param.At(0, i));
    if (spec.master) master.Update([this](int64_t, int64_t i, double) { return p[i]; });
    m.assign(spec.numel, 0.0);
    v.assign(spec.numel, 0.0);
  }

  AdamWTensor Params() {
    AdamWTensor t;
    t.param = param.data(), t.param_dtype = spec.param;
    if (spec.master) t.master = static_cast<float*>(master.data());
    if (spec.has_grad) t.grad = grad.data();
    t.grad_dtype = spec.grad;
    t.exp_avg = static_cast<float*>(exp_avg.data());
    t.exp_avg_sq = static_cast<float*>(exp_avg_sq.data());
    t.step = step.data();
    t.numel = spec.numel, t.group = spec.group;
    return t;
  }

  // One step in fp64, on gradients multiplied by `factor`.
  void Reference(const AdamWGroup& g, double lr, double factor) {
    ++steps;
    const double correction1 = 1 - std::pow(g.beta1, steps);
    const double correction2 = 1 - std::pow(g.beta2, steps);
    for (int64_t i = 0; i < spec.numel; ++i) {
      const double gradient = grad.At(0, i) * factor;
      m[i] = g.beta1 * m[i] + (1 - g.beta1) * gradient;
      v[i] = g.beta2 * v[i] + (1 - g.beta2) * gradient * gradient;
      p[i] -= lr * g.weight_decay * p[i];
      p[i] -= lr * (m[i] / correction1) / (std::sqrt(v[i] / correction2) + g.eps);
    }
  }

  void Download() {
    for (TestTensor* t : {&param, &master, &exp_avg, &exp_avg_sq}) t->Download();
  }

  void Check() {
    EXPECT(step.Get() == static_cast<float>(steps)) << step.Get() << " steps, not " << steps;
    for (int64_t i = 0; i < spec.numel; ++i) {
      ExpectNear(exp_avg.At(0, i), m[i], 1e-6, "exp_avg", i);
      ExpectNear(exp_avg_sq.At(0, i), v[i], 1e-6, "exp_avg_sq", i);
      const TestTensor& exact = spec.master ? master : param;
      if (spec.param == kF32 || spec.master) ExpectNear(exact.At(0, i), p[i], 3e-6, "p", i);
      const double rounded = spec.master ? master.At(0, i) : p[i];
      const double ulp = 1.001 * RoundingError(spec.param) / (1 + std::abs(rounded));
      ExpectNear(param.At(0, i), rounded, 3e-6 + ulp * std::abs(rounded), "param", i);
      // A parameter without master copy is what its dtype holds: the next step starts there.
      if (spec.param != kF32 && !spec.master) p[i] = param.At(0, i);
    }
  }

  static void ExpectNear(double actual, double expected, double tolerance, const char* what,
                         int64_t i) {
    if (std::abs(actual - expected) <= tolerance * (1 + std::abs(expected))) return;
    EXPECT(false) << what << " " << i << ": " << actual << ", not " << expected;
  }

  Spec spec;
  TestTensor param, master, grad, exp_avg, exp_avg_sq;
  DeviceScalar<float> step;
  std::vector<double> p, m, v;
  int steps = 0;
};

struct Problem {
  explicit Problem(const std::vector<Spec>& specs) {
    for (const Spec& spec : specs) tensors.push_back(std::make_unique<Tensor>(spec, random));
    AdamWGroup other;
    other.lr = 3e-2, other.beta1 = 0.8, other.beta2 = 0.95, other.eps = 1e-6;
    other.weight_decay = 0.3;
    groups = {AdamWGroup(), other};
    groups[0].lr = 1e-2;
  }
  ~Problem() {
    if (table != nullptr) testing::Free(table);
  }

  void NewGradients(double size) {
    for (auto& t : tensors) t->grad.FillNormal(random, 0.1 * size, size);
  }

  // `scalars`: grad_scale and the like.
  AdamWParams Params(AdamWParams scalars = AdamWParams()) {
    records.clear();
    for (auto& t : tensors) records.push_back(t->Params());
    AdamWParams p = scalars;
    p.tensors = records.data(), p.num_tensors = static_cast<int64_t>(records.size());
    p.groups = groups.data(), p.num_groups = static_cast<int64_t>(groups.size());
    p.table_bytes = AdamWTableBytes(p.num_tensors, p.num_groups);
    if (table == nullptr) table = testing::Allocate(p.table_bytes);
    table_on_host.resize(p.table_bytes);
    p.table = table, p.table_on_host = remember ? table_on_host.data() : nullptr;
    return p;
  }

  void Step(const AdamWParams& scalars = AdamWParams()) {
    const Status status = AdamWStep(Params(scalars), TestDevice(), nullptr);
    EXPECT(status.ok()) << status.message();
    testing::Synchronize();
    for (auto& t : tensors) t->Download();
  }

  void Reference(double factor = 1.0) {
    for (auto& t : tensors) {
      const AdamWGroup& group = groups[t->spec.group];
      if (t->spec.has_grad) t->Reference(group, group.lr, factor);
    }
  }

  void Check() {
    for (size_t i = 0; i < tensors.size(); ++i) {
      const Scope scope("tensor " + std::to_string(i) + " of " +
                        std::to_string(tensors[i]->spec.numel));
      tensors[i]->Check();
    }
  }

  std::mt19937_64 random{7};
  std::vector<std::unique_ptr<Tensor>> tensors;
  std::vector<AdamWGroup> groups;
  std::vector<AdamWTensor> records;
  void* table = nullptr;
  std::vector<char> table_on_host;
  bool remember = true;
};

}  // namespace flashtrain
