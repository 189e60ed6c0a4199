// The products of fused_dense.h on a CUDA device against fp64, with every algorithm offered. They
// need cuBLASLt in the loader's path; where it is not, they say so, and the tests of
// flashtrain.ops.fused_dense, which bring torch's, are all there is.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iostream>
#include <random>
#include <string>
#include <vector>

#include "flashtrain/common/test_memory.h"
#include "flashtrain/common/test_tensor.h"
#include "flashtrain/common/testing.h"
#include "flashtrain/fused_dense/fused_dense.h"

namespace flashtrain {
namespace {

using testing::RoundingError;
using testing::Scope;
using testing::TestTensor;

constexpr int kAlgorithms = 6;

double Gelu(double x) {
  return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
}

double GeluDerivative(double x) {
  const double step = 1e-5;
  return (Gelu(x + step) - Gelu(x - step)) / (2.0 * step);
}

struct Layer {
  int64_t rows, in, out;
  DType dtype;
  TestTensor x, weight, bias, dout, pre_act;

  Layer(int64_t rows, int64_t in, int64_t out, DType dtype)
      : rows(rows),
        in(in),
        out(out),
        dtype(dtype),
        x(rows, in, dtype),
        weight(out, in, dtype),
        bias(1, out, dtype),
        dout(rows, out, dtype),
        pre_act(rows, in, dtype) {
    std::mt19937_64 random(5);
    x.FillNormal(random, 0.0, 1.0);
    weight.FillNormal(random, 0.0, 1.0 / std::sqrt(static_cast<double>(in)));
    bias.FillNormal(random, 0.0, 1.0);
    dout.FillNormal(random, 0.0, 1.0);
    pre_act.FillNormal(random, 0.0, 1.0);
  }

  DenseMatmulParams Params(DenseMatmul matmul) const {
    DenseMatmulParams p;
    p.matmul = matmul, p.rows = rows, p.in_features = in, p.out_features = out, p.dtype = dtype;
    p.left = matmul == DenseMatmul::kForward ? x.data() : dout.data();
    p.right = matmul == DenseMatmul::kWeightGradient ? x.data() : weight.data();
    return p;
  }
};

// `roundings`: to the dtype, on the way to the result. cuBLASLt's GELU has a fast tanh, seen to be
// wrong by up to 2.4e-5.
void ExpectClose(const char* name, TestTensor& got, int64_t row, int64_t col, double expected,
                 double roundings = 1.0) {
  const double bound = (roundings > 1.0 ? 1e-4 : 2e-5) +
                       roundings * (RoundingError(got.dtype()) + 1e-5) * (std::abs(expected) + 0.1);
  const bool close = std::abs(got.At(row, col) - expected) <= bound;
  if (!close) {
    EXPECT(close) << name << "[" << row << ", " << col << "] " << got.At(row, col)
                  << " != " << expected;
  }
}

// Runs every algorithm for `p`; `check` compares what each wrote.
template <typename Check>
void ForEachAlgorithm(const DenseMatmulParams& p, Check check) {
  std::vector<DenseMatmulAlgorithm> algorithms;
  const Status found = DenseMatmulAlgorithms(p, kAlgorithms, &algorithms);
  // The library need not have every epilogue for few rows, nor in fp32.
  const bool must_have = p.rows >= 256 && p.dtype != DType::kFloat32;
  EXPECT(found.ok() || (!must_have && found.code() == StatusCode::kUnavailable)) << found.message();
  for (const DenseMatmulAlgorithm& algorithm : algorithms) {
    const Status accepted = DenseMatmulCheck(p, algorithm);
    EXPECT(accepted.ok()) << accepted.message();
    void* workspace = testing::Allocate(algorithm.workspace_bytes);
    const Status status = DenseMatmulRun(p, algorithm, workspace, nullptr);
    EXPECT(status.ok()) << status.message();
    testing::Synchronize();
    testing::Free(workspace);
    check();
  }
}

void CheckForward(const Layer& layer, Activation activation, bool with_bias) {
  const Scope scope("forward, activation " + std::to_string(static_cast<int>(activation)));
  TestTensor out(layer.rows, layer.out, layer.dtype), aux(layer.rows, layer.out, layer.dtype);
  DenseMatmulParams p = layer.Params(DenseMatmul::kForward);
  p.activation = activation;
  p.out = out.data(), p.bias = with_bias ? layer.bias.data() : nullptr;
  const bool gelu = activation == Activation::kGeluApprox;
  if (gelu) p.pre_act = aux.data();
  ForEachAlgorithm(p, [&] {
    out.Download();
    if (gelu) aux.Download();
    for (int64_t row = 0; row < layer.rows; ++row) {
      for (int64_t col = 0; col < layer.out; ++col) {
        double sum = with_bias ? layer.bias.At(0, col) : 0.0;
        for (int64_t k = 0; k < layer.in; ++k) sum += layer.x.At(row, k) * layer.weight.At(col, k);
        if (gelu) ExpectClose("aux", aux, row, col, sum);
        if (activation == Activation::kRelu) sum = std::max(sum, 0.0);
        ExpectClose("out", out, row, col, gelu ? Gelu(sum) : sum, gelu ? 2.0 : 1.0);
      }
    }
  });
}

void CheckInputGradient(const Layer& layer, bool gelu, bool with_dbias) {
  const Scope scope("input gradient, gelu " + std::to_string(gelu));
  TestTensor dx(layer.rows, layer.in, layer.dtype), dbias(1, layer.in, layer.dtype);
  DenseMatmulParams p = layer.Params(DenseMatmul::kInputGradient);
  p.out = dx.data();
  if (gelu) p.activation = Activation::kGeluApprox, p.pre_act = layer.pre_act.data();
  if (with_dbias) p.dbias = dbias.data();
  ForEachAlgorithm(p, [&] {
    dx.Download();
    if (with_dbias) dbias.Download();
    for (int64_t col = 0; col < layer.in; ++col) {
      double total = 0.0;
      for (int64_t row = 0; row < layer.rows; ++row) {
        double sum = 0.0;
        for (int64_t k = 0; k < layer.out; ++k) {
          sum += layer.dout.At(row, k) * layer.weight.At(k, col);
        }
        if (gelu) sum *= GeluDerivative(layer.pre_act.At(row, col));
        // The library may round the product before it multiplies, and its tanh is not exact.
        ExpectClose("dx", dx, row, col, sum, gelu ? 3.0 : 1.0);
        total += sum;
      }
      if (!with_dbias) continue;
      // The library may sum what it has rounded.
      const double bound = RoundingError(layer.dtype) * (std::abs(total) + 2.0 * layer.rows) + 1e-3;
      EXPECT(std::abs(dbias.At(0, col) - total) <= bound)
          << "dbias[" << col << "] " << dbias.At(0, col) << " != " << total;
    }
  });
}

void CheckWeightGradient(const Layer& layer, bool with_dbias) {
  const Scope scope("weight gradient");
  TestTensor dweight(layer.out, layer.in, layer.dtype), dbias(1, layer.out, layer.dtype);
  DenseMatmulParams p = layer.Params(DenseMatmul::kWeightGradient);
  p.out = dweight.data(), p.dbias = with_dbias ? dbias.data() : nullptr;
  ForEachAlgorithm(p, [&] {
    dweight.Download();
    if (with_dbias) dbias.Download();
    for (int64_t o = 0; o < layer.out; ++o) {
      double total = 0.0;
      for (int64_t row = 0; row < layer.rows; ++row) total += layer.dout.At(row, o);
      if (with_dbias) ExpectClose("dbias", dbias, 0, o, total);
      for (int64_t i = 0; i < layer.in; ++i) {
        double sum = 0.0;
        for (int64_t row = 0; row < layer.rows; ++row) {
          sum += layer.dout.At(row, o) * layer.x.At(row, i);
        }
        ExpectClose("dweight", dweight, o, i, sum);
      }
    }
  });
}

TEST(Products) {
  int64_t version = 0;
  const Status library = DenseMatmulVersion(&version);
  if (!library.ok()) {
    std::cerr << "products not run: " << library.message() << "\n";
    EXPECT(library.code() == StatusCode::kUnavailable);
    return;
  }
  EXPECT(version >= 130000);
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    for (const int64_t rows : {1, 37, 256}) {
      const Scope scope(std::string(DTypeName(dtype)) + " rows " + std::to_string(rows));
      const Layer layer(rows, 64, 128, dtype);
      CheckForward(layer, Activation::kIdentity, false);
      CheckForward(layer, Activation::kIdentity, true);
      CheckForward(layer, Activation::kGeluApprox, true);
      CheckForward(layer, Activation::kRelu, true);
      CheckInputGradient(layer, false, false);
      CheckInputGradient(layer, true, false);
      CheckInputGradient(layer, true, true);
      CheckWeightGradient(layer, false);
      CheckWeightGradient(layer, true);
    }
  }
}

template <typename Change>
void ExpectRefused(Change change, const std::string& message) {
  DenseMatmulParams p;
  p.rows = 8, p.in_features = 64, p.out_features = 64, p.dtype = DType::kBFloat16;
  change(p);
  std::vector<DenseMatmulAlgorithm> algorithms;
  const Status status = DenseMatmulAlgorithms(p, 1, &algorithms);
  EXPECT(status.code() == StatusCode::kInvalidArgument);
  EXPECT(status.message().find(message) != std::string::npos) << status.message();
}

TEST(MatmulErrors) {
  using P = DenseMatmulParams;
  float some[4] = {};
  ExpectRefused([](P& p) { p.rows = 0; }, "rows is 0");
  ExpectRefused([](P& p) { p.in_features = 12; }, "in_features is 12; it must be a multiple of 8");
  ExpectRefused([](P& p) { p.activation = Activation::kSquaredRelu; }, "activation is 3");
  ExpectRefused([&](P& p) { p.pre_act = some; }, "pre_act must be null but with kGeluApprox");
  ExpectRefused([&](P& p) { p.dbias = some; }, "dbias must be null");
  ExpectRefused([&](P& p) { p.matmul = DenseMatmul::kWeightGradient, p.bias = some; }, "bias must");
  ExpectRefused(
      [](P& p) { p.matmul = DenseMatmul::kInputGradient, p.activation = Activation::kGeluApprox; },
      "pre_act is null");
  ExpectRefused([&](P& p) { p.activation = Activation::kRelu, p.pre_act = some; }, "pre_act must");
  ExpectRefused(
      [](P& p) { p.matmul = DenseMatmul::kInputGradient, p.activation = Activation::kRelu; },
      "activation is 2");
}

}  // namespace
}  // namespace flashtrain
