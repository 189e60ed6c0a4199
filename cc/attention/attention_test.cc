// Drives attention.h against fp64.
#include "flashtrain/attention/attention.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "flashtrain/common/parallel.h"
#include "flashtrain/common/philox.h"
#include "flashtrain/common/test_tensor.h"
#include "flashtrain/common/testing.h"

namespace flashtrain {
namespace {

using testing::Layout;
using testing::RoundingError;
using testing::Scope;
using testing::TestTensor;

constexpr DType kF32 = DType::kFloat32, kF16 = DType::kFloat16, kBF16 = DType::kBFloat16;
constexpr uint64_t kRngState[2] = {0x1234567890ABCDEF, 0x100000004};

struct Case {
  int64_t batch = 1, seqlen_q = 70, seqlen_k = 70, heads = 2, heads_k = 2, head_dim = 16;
  std::vector<int32_t> cu_q, cu_k;  // not empty: varlen; batch and seqlens are what they say
  int64_t left = -1, right = 0;
  float scale = 0.0f;  // 0: of the head dim
  float softcap = 0.0f, dropout = 0.0f;
  bool alibi = false;
  DType dtype = kF32;
  Layout layout;

  std::string Name() const {
    return std::to_string(batch) + "x" + std::to_string(seqlen_q) + "x" + std::to_string(seqlen_k) +
           " heads=" + std::to_string(heads) + "/" + std::to_string(heads_k) +
           " head_dim=" + std::to_string(head_dim) + " window=" + std::to_string(left) + "," +
           std::to_string(right) + " softcap=" + std::to_string(softcap) +
           " dropout=" + std::to_string(dropout) + (alibi ? " alibi " : " ") + DTypeName(dtype) +
           (cu_q.empty() ? "" : " varlen") + " padding=" + std::to_string(layout.padding);
  }
};

// All tensors of a case; a row of a TestTensor is all heads of a query or key.
struct Problem {
  explicit Problem(const Case& c)
      : c(c),
        total_q(c.cu_q.empty() ? c.batch * c.seqlen_q : c.cu_q.back()),
        total_k(c.cu_k.empty() ? c.batch * c.seqlen_k : c.cu_k.back()),
        q(total_q, c.heads * c.head_dim, c.dtype, c.layout),
        out(total_q, c.heads * c.head_dim, c.dtype, c.layout),
        dout(total_q, c.heads * c.head_dim, c.dtype, c.layout),
        dq(total_q, c.heads * c.head_dim, c.dtype, c.layout),
        k(total_k, c.heads_k * c.head_dim, c.dtype, c.layout),
        v(total_k, c.heads_k * c.head_dim, c.dtype, c.layout),
        dk(total_k, c.heads_k * c.head_dim, c.dtype, c.layout),
        dv(total_k, c.heads_k * c.head_dim, c.dtype, c.layout),
        lse(c.heads * total_q, std::nanf("")),
        slopes(c.batch * c.heads) {
    std::mt19937_64 random(total_q * 1000003 + total_k);
    for (TestTensor* t : {&q, &k, &v, &dout}) t->FillNormal(random, 0.0, 1.0);
    for (size_t i = 0; i < slopes.size(); ++i) slopes[i] = 0.5f / (1.0f + i);
  }

  AttentionTensor Tensor(const TestTensor& t, int64_t seqlen) const {
    return {t.data(), seqlen * t.stride(), t.stride(), c.head_dim};
  }

  AttentionBackwardParams Params() {
    AttentionBackwardParams p;
    p.batch = c.batch, p.max_seqlen_q = c.seqlen_q, p.max_seqlen_k = c.seqlen_k;
    p.num_heads = c.heads, p.num_heads_k = c.heads_k, p.head_dim = c.head_dim, p.dtype = c.dtype;
    if (!c.cu_q.empty()) {
      p.cu_seqlens_q = c.cu_q.data(), p.cu_seqlens_k = c.cu_k.data();
      p.total_q = total_q, p.total_k = total_k;
    }
    p.softmax_scale = Scale(), p.softcap = c.softcap, p.window_left = c.left;
    p.window_right = c.right;
    if (c.alibi) p.alibi_slopes = slopes.data(), p.alibi_batch_stride = c.heads;
    p.dropout_p = c.dropout, p.rng_state = c.dropout > 0 ? kRngState : nullptr;
    p.q = Tensor(q, c.seqlen_q), p.out = Tensor(out, c.seqlen_q);
    p.k = Tensor(k, c.seqlen_k), p.v = Tensor(v, c.seqlen_k);
    p.dout = Tensor(dout, c.seqlen_q), p.dq = Tensor(dq, c.seqlen_q);
    p.dk = Tensor(dk, c.seqlen_k), p.dv = Tensor(dv, c.seqlen_k);
    p.lse = lse.data();
    p.lse_head_stride = c.cu_q.empty() ? c.seqlen_q : total_q;
    p.lse_batch_stride = c.heads * c.seqlen_q;
    return p;
  }

  void Run() {
    const AttentionBackwardParams p = Params();
    const Status forward = AttentionForward(p);
    EXPECT(forward.ok()) << forward.message();
    const Status backward = AttentionBackward(p);
    EXPECT(backward.ok()) << backward.message();
    for (TestTensor* t : {&out, &dq, &dk, &dv}) t->Download();
  }

  float Scale() const {
    return c.scale > 0 ? c.scale : 1.0f / std::sqrt(static_cast<float>(c.head_dim));
  }

  Case c;
  int64_t total_q, total_k;
  TestTensor q, out, dout, dq, k, v, dk, dv;
  std::vector<float> lse, slopes;
};

// The fp64 reference. Sums of magnitudes, of every product down to the dot products of scores and
// gradients, bound what fp32 sums may lose: a sum that cancels has the rounding of its terms.
class Reference {
 public:
  explicit Reference(Problem& problem) : p_(problem), c_(problem.c) {
    for (Matrix* m : {&dk_, &dv_}) m->Resize(p_.total_k, c_.heads_k * c_.head_dim);
  }

  void Check() {
    for (int64_t b = 0; b < c_.batch; ++b) {
      for (int64_t head = 0; head < c_.heads; ++head) CheckHead(b, head);
    }
    for (int64_t row = 0; row < p_.total_k; ++row) {
      for (int64_t col = 0; col < c_.heads_k * c_.head_dim; ++col) {
        ExpectNear(p_.dk.At(row, col), dk_, row, col, "dk");
        ExpectNear(p_.dv.At(row, col), dv_, row, col, "dv");
      }
    }
  }

 private:
  struct Matrix {
    int64_t cols = 0;
    std::vector<double> value, size;
    std::vector<double> rounding;  // what rounding `out` moves the value by, at most
    void Resize(int64_t rows, int64_t columns) {
      cols = columns;
      for (std::vector<double>* v : {&value, &size, &rounding}) v->assign(rows * cols, 0.0);
    }
    void Add(int64_t row, int64_t col, double term, double term_size, double term_rounding = 0.0) {
      value[row * cols + col] += term;
      size[row * cols + col] += term_size;
      rounding[row * cols + col] += term_rounding;
    }
  };

  // Rounding of the result, and fp32 errors of its terms: scores of magnitude 10 are exact to 1e-6,
  // which is the relative error of weights.
  void ExpectNear(double actual, const Matrix& expected, int64_t row, int64_t col,
                  const char* what) {
    const int64_t i = row * expected.cols + col;
    const double value = expected.value[i];
    const double rounded = RoundingError(c_.dtype) * std::abs(value) + expected.rounding[i];
    const double tolerance = 1.01 * rounded + 1e-5 * expected.size[i] + 1e-7;
    EXPECT(std::abs(actual - value) <= tolerance)
        << what << "[" << row << ", " << col << "] is " << actual << ", not " << value;
  }

  // Of an element of out, which backward reads.
  double OutRounding(double out) const {
    if (c_.dtype == kF32) return 0.0;  // among the fp32 errors
    const double subnormal = c_.dtype == kF16 ? std::ldexp(1.0, -25) : 0.0;
    return std::max(RoundingError(c_.dtype) * std::abs(out), subnormal);
  }

  void CheckHead(int64_t b, int64_t head) {
    const bool varlen = !c_.cu_q.empty();
    const int64_t q0 = varlen ? c_.cu_q[b] : b * c_.seqlen_q;
    const int64_t k0 = varlen ? c_.cu_k[b] : b * c_.seqlen_k;
    const int64_t seqlen_q = varlen ? c_.cu_q[b + 1] - q0 : c_.seqlen_q;
    const int64_t seqlen_k = varlen ? c_.cu_k[b + 1] - k0 : c_.seqlen_k;
    for (int64_t i = 0; i < seqlen_q; ++i) {
      CheckQuery(b, head, q0 + i, i + seqlen_k - seqlen_q, k0, seqlen_k);
      const int64_t lse_index =
          varlen ? head * p_.total_q + q0 + i : (b * c_.heads + head) * c_.seqlen_q + i;
      const float lse = p_.lse[lse_index];
      EXPECT(std::isinf(lse_) ? lse == lse_ : std::abs(lse - lse_) <= 1e-5) << lse << " " << lse_;
    }
  }

  // Row `row` of q, at `position` among the keys from row k0 of k.
  void CheckQuery(int64_t b, int64_t head, int64_t row, int64_t position, int64_t k0,
                  int64_t seqlen_k) {
    const int64_t d0 = head * c_.head_dim, kd0 = head / (c_.heads / c_.heads_k) * c_.head_dim;
    std::vector<double> weight(seqlen_k), dtanh(seqlen_k, 1.0);
    std::vector<double> dweight(seqlen_k), dweight_size(seqlen_k);
    double max = -std::numeric_limits<double>::infinity(), sum = 0.0, delta = 0.0;
    for (int64_t j = 0; j < seqlen_k; ++j) {
      double score = Dot(p_.q, row, d0, p_.k, k0 + j, kd0).value * p_.Scale();
      if (c_.softcap > 0) {
        const double tanh = std::tanh(score / c_.softcap);
        score = c_.softcap * tanh;
        dtanh[j] = 1.0 - tanh * tanh;
      }
      if (c_.alibi) score -= p_.slopes[b * c_.heads + head] * std::abs(position - j);
      const bool seen =
          (c_.left < 0 || j >= position - c_.left) && (c_.right < 0 || j <= position + c_.right);
      weight[j] = seen ? score : -std::numeric_limits<double>::infinity();
      max = std::max(max, weight[j]);
    }
    if (std::isinf(max)) max = 0.0;
    for (double& w : weight) sum += w = std::exp(w - max);
    lse_ = max + std::log(sum);
    Matrix out, dq;
    out.Resize(1, c_.head_dim), dq.Resize(1, c_.head_dim);
    const double keep_scale = 1.0 / (1.0 - c_.dropout);
    double delta_size = 0.0, delta_rounding = 0.0;
    for (int64_t j = 0; j < seqlen_k; ++j) {
      weight[j] = sum == 0.0 ? 0.0 : weight[j] / sum;
      const double factor = Kept(row * c_.heads + head, j) ? keep_scale : 0.0;
      const Sum dot = Dot(p_.dout, row, d0, p_.v, k0 + j, kd0);
      dweight[j] = dot.value * factor, dweight_size[j] = dot.size * factor;
      delta += weight[j] * dweight[j];
      delta_size += weight[j] * dweight_size[j];
      for (int64_t d = 0; d < c_.head_dim; ++d) {
        const double to_out = weight[j] * factor * p_.v.At(k0 + j, kd0 + d);
        const double to_dv = weight[j] * factor * p_.dout.At(row, d0 + d);
        out.Add(0, d, to_out, std::abs(to_out));
        dv_.Add(k0 + j, kd0 + d, to_dv, std::abs(to_dv));
      }
    }
    for (int64_t d = 0; d < c_.head_dim; ++d) {
      delta_rounding += OutRounding(out.value[d]) * std::abs(p_.dout.At(row, d0 + d));
    }
    for (int64_t j = 0; j < seqlen_k; ++j) {
      const double scaled = weight[j] * p_.Scale();
      const double ds = scaled * (dweight[j] - delta) * dtanh[j];
      const double size = scaled * (dweight_size[j] + delta_size);
      const double rounding = scaled * delta_rounding * dtanh[j];
      for (int64_t d = 0; d < c_.head_dim; ++d) {
        const double key = p_.k.At(k0 + j, kd0 + d), query = p_.q.At(row, d0 + d);
        dq.Add(0, d, ds * key, size * std::abs(key), rounding * std::abs(key));
        dk_.Add(k0 + j, kd0 + d, ds * query, size * std::abs(query), rounding * std::abs(query));
      }
    }
    for (int64_t d = 0; d < c_.head_dim; ++d) {
      ExpectNear(p_.out.At(row, d0 + d), out, 0, d, "out");
      ExpectNear(p_.dq.At(row, d0 + d), dq, 0, d, "dq");
    }
  }

  struct Sum {
    double value = 0.0, size = 0.0;
  };

  Sum Dot(const TestTensor& a, int64_t a_row, int64_t a_col, const TestTensor& b, int64_t b_row,
          int64_t b_col) const {
    Sum sum;
    for (int64_t d = 0; d < c_.head_dim; ++d) {
      const double term = a.At(a_row, a_col + d) * b.At(b_row, b_col + d);
      sum.value += term, sum.size += std::abs(term);
    }
    return sum;
  }

  bool Kept(int64_t row, int64_t key) const {
    const Philox4 random =
        PhiloxBlock(kRngState[0], kRngState[1], row, static_cast<uint32_t>(key / 4));
    return random.word[key % 4] >= DropoutThreshold(c_.dropout);
  }

  Problem& p_;
  const Case& c_;
  Matrix dk_, dv_;
  double lse_ = 0.0;
};

void CheckCase(const Case& c) {
  const Scope scope(c.Name());
  Problem problem(c);
  problem.Run();
  Reference(problem).Check();
}

TEST(Sizes) {
  for (const int64_t seqlen_q : {1, 2, 15, 64, 65, 130}) {
    for (const int64_t seqlen_k : {1, 3, 64, 67, 140}) {
      for (const int64_t right : {-1, 0}) {
        Case c;
        c.seqlen_q = seqlen_q, c.seqlen_k = seqlen_k, c.right = right;
        CheckCase(c);
      }
    }
  }
}

TEST(HeadDims) {
  for (const int64_t head_dim : {1, 3, 8, 31, 64, 80, 128, 257}) {
    for (const DType dtype : {kF32, kF16, kBF16}) {
      Case c;
      c.head_dim = head_dim, c.dtype = dtype;
      CheckCase(c);
    }
  }
}

TEST(Options) {
  for (int bits = 0; bits < 128; ++bits) {
    Case c;
    c.batch = 2, c.seqlen_k = 90, c.heads = 4, c.heads_k = bits & 1 ? 2 : 4;
    c.softcap = bits & 2 ? 3.0f : 0.0f;
    c.alibi = bits & 4;
    c.dropout = bits & 8 ? 0.3f : 0.0f;
    c.left = bits & 16 ? 20 : -1;
    c.right = bits & 32 ? 7 : -1;
    c.dtype = bits & 64 ? kBF16 : kF32;
    CheckCase(c);
  }
}

// Every tile boundary on either side.
TEST(Windows) {
  for (const int64_t left : {-1, 0, 1, 2, 63, 64, 65, 127}) {
    for (const int64_t right : {-1, 0, 1, 63, 64, 65}) {
      for (const int64_t seqlen_k : {130, 140}) {
        Case c;
        c.seqlen_q = 130, c.seqlen_k = seqlen_k, c.heads = c.heads_k = 1, c.head_dim = 4;
        c.left = left, c.right = right;
        CheckCase(c);
      }
    }
  }
}

TEST(Varlen) {
  for (const float dropout : {0.0f, 0.25f}) {
    Case c;
    c.batch = 6, c.seqlen_q = 130, c.seqlen_k = 131, c.alibi = true, c.dropout = dropout;
    c.cu_q = {0, 5, 5, 135, 136, 140, 140};
    c.cu_k = {0, 9, 12, 143, 143, 145, 145};
    CheckCase(c);
  }
}

TEST(Strides) {
  for (const int64_t padding : {1, 8, 100}) {
    for (const int64_t offset : {0, 1}) {
      for (const DType dtype : {kF32, kBF16}) {
        Case c;
        c.batch = 2, c.layout.padding = padding, c.layout.offset = offset, c.dtype = dtype;
        CheckCase(c);
      }
    }
  }
}

TEST(NothingToDo) {
  for (const int64_t empty : {0, 1, 2}) {
    Case c;
    if (empty == 0) c.batch = 0;
    if (empty == 1) c.seqlen_q = 0;
    if (empty == 2) c.seqlen_k = 0;
    CheckCase(c);
  }
}

// A rows's maximum of -inf, +inf or NaN must not spread to other queries.
TEST(NonFiniteQueriesStayAlone) {
  for (const double bad :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    Case c;
    Problem problem(c);
    problem.q.Set(5, 2, bad);
    problem.Run();
    for (int64_t row = 0; row < c.seqlen_q; ++row) {
      for (int64_t col = 0; col < c.heads * c.head_dim; ++col) {
        const bool finite = row != 5 || col >= c.head_dim;
        EXPECT(std::isfinite(problem.out.At(row, col)) == finite) << row << ", " << col;
        EXPECT(std::isfinite(problem.dq.At(row, col)) == finite) << row << ", " << col;
      }
    }
  }
}

// Backward computes its weights from lse, so they sum to 1 but for what rounding that to fp32 moves
// them by: 4e-6 of a lse of 100. With one query, dv summed over the keys is dout times their sum.
TEST(WeightsOfLargeScoresSumToOne) {
  Case c;
  c.batch = 100, c.seqlen_q = 1, c.scale = 4.0f, c.head_dim = 64;
  Problem problem(c);
  problem.Run();
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t col = 0; col < c.heads * c.head_dim; ++col) {
      double sum = 0.0;
      for (int64_t j = 0; j < c.seqlen_k; ++j) sum += problem.dv.At(b * c.seqlen_k + j, col);
      const double dout = problem.dout.At(b, col);
      const double lse = problem.lse[b * c.heads + col / c.head_dim];
      const double tolerance = (RoundingError(kF32) * std::abs(lse) + 1e-6) * std::abs(dout);
      EXPECT(std::abs(sum - dout) <= tolerance)
          << "query " << b << ", element " << col << ": " << sum << ", not " << dout;
    }
  }
}

TEST(SameBitsForAnyNumberOfThreads) {
  Case c;
  c.batch = 2, c.heads = 4, c.seqlen_q = c.seqlen_k = 150, c.dropout = 0.1f;
  std::vector<std::vector<char>> bits;
  const int before = GetNumThreads();
  for (const int threads : {1, 2, 5}) {
    SetNumThreads(threads);
    Problem problem(c);
    problem.Run();
    for (const TestTensor* t : {&problem.out, &problem.dq, &problem.dk, &problem.dv}) {
      bits.push_back(t->bits());
    }
  }
  SetNumThreads(before);
  for (size_t i = 4; i < bits.size(); ++i) EXPECT(bits[i] == bits[i - 4]);
}

// Neither memory nor tasks are counted by max_seqlen, and windows may be as large as they can.
TEST(UpperBoundsCostNothing) {
  Case c;
  c.batch = 3, c.cu_q = {0, 5, 5, 75}, c.cu_k = {0, 70, 73, 75}, c.right = -1;
  Problem problem(c), bounded(c);
  problem.Run();
  AttentionBackwardParams p = bounded.Params();
  p.max_seqlen_q = p.max_seqlen_k = p.window_left = p.window_right =
      std::numeric_limits<int64_t>::max();
  EXPECT(AttentionForward(p).ok());
  EXPECT(AttentionBackward(p).ok());
  for (TestTensor* t : {&bounded.out, &bounded.dq, &bounded.dk, &bounded.dv}) t->Download();
  EXPECT(bounded.out.bits() == problem.out.bits());
  EXPECT(bounded.dq.bits() == problem.dq.bits());
  EXPECT(bounded.dk.bits() == problem.dk.bits());
  EXPECT(bounded.dv.bits() == problem.dv.bits());
}

TEST(Errors) {
  Case c;
  Problem problem(c);
  const auto refuse = [&](const char* text, auto change) {
    AttentionBackwardParams p = problem.Params();
    change(p);
    const Status status = AttentionBackward(p);
    EXPECT(status.code() == StatusCode::kInvalidArgument) << text;
    EXPECT(status.message().find(text) != std::string::npos) << status.message();
  };
  using P = AttentionBackwardParams;
  refuse("num_heads is 2; it must be a multiple of num_heads_k = 3",
         [](P& p) { p.num_heads_k = 3; });
  refuse("head_dim is 0; it must be at least 1", [](P& p) { p.head_dim = 0; });
  refuse("max_seqlen_k is -1", [](P& p) { p.max_seqlen_k = -1; });
  refuse("window_left is -2; it must be at least -1", [](P& p) { p.window_left = -2; });
  refuse("softmax_scale is -1", [](P& p) { p.softmax_scale = -1.0f; });
  refuse("softcap is -1", [](P& p) { p.softcap = -1.0f; });
  refuse("softcap is inf", [](P& p) { p.softcap = std::numeric_limits<float>::infinity(); });
  refuse("batch, queries, num_heads, head_dim: got 1, 70, 2, 4611686018427387904; supported: at",
         [](P& p) { p.head_dim = int64_t{1} << 62; });
  refuse("dropout_p is 1", [](P& p) { p.dropout_p = 1.0f; });
  refuse("rng_state is null; it is required when dropout_p > 0", [](P& p) { p.dropout_p = 0.5f; });
  refuse("dtype is unknown dtype", [](P& p) { p.dtype = static_cast<DType>(9); });
  refuse("q is null", [](P& p) { p.q.data = nullptr; });
  refuse("lse is null", [](P& p) { p.lse = nullptr; });
  refuse("dv is null", [](P& p) { p.dv.data = nullptr; });
  const std::vector<int32_t> good = {0, 70}, bad = {0, 71}, short_of = {0, 69};
  const auto varlen = [&](P& p, const std::vector<int32_t>& cu) {
    p.cu_seqlens_q = cu.data(), p.cu_seqlens_k = good.data(), p.total_q = p.total_k = 70;
  };
  refuse("cu_seqlens_q gives sequence 0 a length of 71", [&](P& p) { varlen(p, bad); });
  refuse("cu_seqlens_q ends with 69", [&](P& p) { varlen(p, short_of); });
  refuse("both or none must be given", [&](P& p) { p.cu_seqlens_q = good.data(); });
}

}  // namespace
}  // namespace flashtrain
