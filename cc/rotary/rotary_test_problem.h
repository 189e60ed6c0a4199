// A rotary problem on the device under test, and its fp64 reference.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "flashtrain/common/test_memory.h"
#include "flashtrain/common/test_tensor.h"
#include "flashtrain/common/testing.h"
#include "flashtrain/rotary/rotary.h"

namespace flashtrain {

using testing::Layout;
using testing::RoundingError;
using testing::Scope;
using testing::TestDevice;
using testing::TestTensor;

inline constexpr DType kF32 = DType::kFloat32, kF16 = DType::kFloat16, kBF16 = DType::kBFloat16;

enum class Positions { kPlain, kOffsets, kSequences, kSequencesAndOffsets, kIds };

struct Case {
  int64_t batch = 2, seqlen = 5, head_dim = 64, rotary_dim = 64;
  std::vector<int64_t> heads = {3, 2, 1};  // queries, keys, and values, which are copied
  DType dtype = kF32, table = kF32;
  bool interleaved = false, conjugate = false, in_place = false, int32 = false;
  Positions positions = Positions::kPlain;
  int64_t seqlen_offset = 0;
  int64_t head_gap = 0;  // elements between heads
  Layout layout;         // of the token rows
  Layout table_layout;

  std::string Name() const {
    std::string name = std::to_string(batch) + "x" + std::to_string(seqlen) + " heads";
    for (const int64_t h : heads) name += " " + std::to_string(h);
    return name + " dim=" + std::to_string(head_dim) + " rotary=" + std::to_string(rotary_dim) +
           " " + DTypeName(dtype) + " table=" + DTypeName(table) +
           (interleaved ? " interleaved" : "") + (conjugate ? " conjugate" : "") +
           (in_place ? " in place" : "") + (int32 ? " int32" : "") +
           " positions=" + std::to_string(static_cast<int>(positions)) +
           " offset=" + std::to_string(seqlen_offset) + " gap=" + std::to_string(head_gap) +
           " padding=" + std::to_string(layout.padding) + "+" + std::to_string(layout.offset) +
           " table padding=" + std::to_string(table_layout.padding) + "+" +
           std::to_string(table_layout.offset);
  }
  int64_t total_heads() const {
    int64_t sum = 0;
    for (const int64_t h : heads) sum += h;
    return sum;
  }
  int64_t head_stride() const { return head_dim + head_gap; }
};

// Integers on the device, as int64 or int32.
class DeviceIndex {
 public:
  DeviceIndex(const std::vector<int64_t>& values, bool int32) {
    const std::vector<int32_t> narrow(values.begin(), values.end());
    const int64_t bytes = static_cast<int64_t>(values.size()) * (int32 ? 4 : 8);
    data_ = testing::Allocate(bytes);
    testing::CopyToDevice(data_, int32 ? static_cast<const void*>(narrow.data()) : values.data(),
                          bytes);
  }
  ~DeviceIndex() { testing::Free(data_); }
  DeviceIndex(const DeviceIndex&) = delete;
  DeviceIndex& operator=(const DeviceIndex&) = delete;
  const void* data() const { return data_; }

 private:
  void* data_;
};

inline constexpr int64_t kTableLen = 40;

struct Problem {
  explicit Problem(const Case& c)
      : c(c),
        x(c.batch * c.seqlen, c.total_heads() * c.head_stride(), c.dtype, c.layout),
        out(c.batch * c.seqlen, c.total_heads() * c.head_stride(), c.dtype, c.layout),
        cos_q(kTableLen, c.rotary_dim / 2, c.table, c.table_layout),
        sin_q(kTableLen, c.rotary_dim / 2, c.table, c.table_layout),
        cos_k(kTableLen, c.rotary_dim / 2, c.table, c.table_layout),
        sin_k(kTableLen, c.rotary_dim / 2, c.table, c.table_layout) {
    std::mt19937_64 random(1);
    for (TestTensor* t : {&x, &cos_q, &sin_q, &cos_k, &sin_k}) t->FillNormal(random, 0, 1);
    const int64_t tokens = c.batch * c.seqlen;
    const bool sequences =
        c.positions == Positions::kSequences || c.positions == Positions::kSequencesAndOffsets;
    // Three sequences, the second empty, and two tokens after the last.
    cu_seqlens = {0, tokens / 3, tokens / 3, std::max<int64_t>(tokens / 3, tokens - 2)};
    const int64_t num_sequences = sequences ? 3 : c.batch;
    for (int64_t b = 0; b < num_sequences; ++b) offsets.push_back((5 * b + 3) % 11);
    for (int64_t i = 0; i < tokens; ++i) ids.push_back(i * 7 % kTableLen);
    device_cu_seqlens = std::make_unique<DeviceIndex>(cu_seqlens, c.int32);
    device_offsets = std::make_unique<DeviceIndex>(offsets, c.int32);
    device_ids = std::make_unique<DeviceIndex>(ids, c.int32);
  }

  RotaryParams Params() const {
    RotaryParams p;
    const bool sequences =
        c.positions == Positions::kSequences || c.positions == Positions::kSequencesAndOffsets;
    p.batch = sequences ? 1 : c.batch;
    p.seqlen = sequences ? c.batch * c.seqlen : c.seqlen;
    p.head_dim = c.head_dim, p.rotary_dim = c.rotary_dim, p.dtype = c.dtype;
    p.num_parts = static_cast<int>(c.heads.size());
    const TestTensor& to = c.in_place ? x : out;
    int64_t head = 0;
    for (int i = 0; i < p.num_parts; head += c.heads[i++]) {
      RotaryPart& part = p.parts[i];
      const int64_t offset = head * c.head_stride() * DTypeSize(c.dtype);
      part.x = static_cast<const char*>(x.data()) + offset;
      part.out = static_cast<char*>(to.data()) + offset;
      part.x_batch_stride = part.out_batch_stride = p.seqlen * x.stride();
      part.x_seq_stride = part.out_seq_stride = x.stride();
      part.x_head_stride = part.out_head_stride = c.head_stride();
      part.heads = c.heads[i];
      if (i == 0) part.cos = cos_q.data(), part.sin = sin_q.data();
      if (i == 1) part.cos = cos_k.data(), part.sin = sin_k.data();
    }
    p.table_len = kTableLen, p.table_row_stride = cos_q.stride(), p.table_dtype = c.table;
    p.seqlen_offset = c.seqlen_offset;
    p.index_is_int32 = c.int32;
    if (c.positions == Positions::kOffsets || c.positions == Positions::kSequencesAndOffsets) {
      p.seqlen_offsets = device_offsets->data();
    }
    if (sequences) p.cu_seqlens = device_cu_seqlens->data(), p.num_sequences = 3;
    if (c.positions == Positions::kIds) {
      p.position_ids = device_ids->data();
      p.position_batch_stride = c.seqlen, p.position_seq_stride = 1;
    }
    p.interleaved = c.interleaved, p.conjugate = c.conjugate;
    return p;
  }

  // -1: the token is copied.
  int64_t PositionOf(int64_t row) const {
    switch (c.positions) {
      case Positions::kIds:
        return ids[row];
      case Positions::kPlain:
        return row % c.seqlen + c.seqlen_offset;
      case Positions::kOffsets:
        return row % c.seqlen + c.seqlen_offset + offsets[row / c.seqlen];
      default:
        break;
    }
    if (row >= cu_seqlens[3]) return -1;
    const int sequence = row < cu_seqlens[1] ? 0 : 2;
    const bool with_offsets = c.positions == Positions::kSequencesAndOffsets;
    return row - cu_seqlens[sequence] + c.seqlen_offset + (with_offsets ? offsets[sequence] : 0);
  }

  // The exact value of an element of part `i` of `row`, and its size before rounding.
  double Expected(int i, int64_t row, int64_t first, int64_t d, double* size) const {
    const double own = x.At(row, first + d);
    const int64_t position = PositionOf(row), half = c.rotary_dim / 2;
    *size = 0;
    if (i > 1 || position < 0 || d >= c.rotary_dim) return own;
    const TestTensor& cos = i == 0 ? cos_q : cos_k;
    const TestTensor& sin = i == 0 ? sin_q : sin_k;
    const int64_t pair = c.interleaved ? d / 2 : d % half;
    const bool is_a = c.interleaved ? d % 2 == 0 : d < half;
    const int64_t other = c.interleaved ? d ^ 1 : (d + half) % c.rotary_dim;
    const double sign = (is_a ? -1.0 : 1.0) * (c.conjugate ? -1.0 : 1.0);
    const double first_term = own * cos.At(position, pair);
    const double second_term = sign * x.At(row, first + other) * sin.At(position, pair);
    *size = std::abs(first_term) + std::abs(second_term);
    return first_term + second_term;
  }

  void Run() {
    const Status status = Rotary(Params(), TestDevice(), nullptr);
    EXPECT(status.ok()) << status.message();
    testing::Synchronize();
  }

  // `actual`: what Run wrote, downloaded; `x` still holds what it read.
  void Check(const TestTensor& actual) const {
    for (int64_t row = 0; row < c.batch * c.seqlen; ++row) {
      int64_t first = 0;
      for (size_t i = 0; i < c.heads.size(); ++i) {
        for (int64_t head = 0; head < c.heads[i]; ++head, first += c.head_stride()) {
          for (int64_t d = 0; d < c.head_stride(); ++d) {
            CheckElement(actual, static_cast<int>(i), row, first, d);
          }
        }
      }
    }
  }

  void CheckElement(const TestTensor& actual, int i, int64_t row, int64_t first, int64_t d) const {
    const double got = actual.At(row, first + d);
    if (d >= c.head_dim) {  // between heads: as it was
      EXPECT(c.in_place ? got == x.At(row, first + d) : std::isnan(got)) << row << ", " << d;
      return;
    }
    double size;
    const double expected = Expected(i, row, first, d, &size);
    const double subnormal = c.dtype == kF16 && size > 0 ? 6e-8 : 0.0;
    const double rounding = size > 0 ? 1.01 * RoundingError(c.dtype) * std::abs(expected) : 0.0;
    EXPECT(std::abs(got - expected) <= rounding + 3e-7 * size + subnormal)
        << "part " << i << ", token " << row << ", element " << d << " is " << got << ", not "
        << expected;
  }

  Case c;
  TestTensor x, out, cos_q, sin_q, cos_k, sin_k;
  std::vector<int64_t> cu_seqlens, offsets, ids;
  std::unique_ptr<DeviceIndex> device_cu_seqlens, device_offsets, device_ids;
};

inline void CheckCase(const Case& c) {
  const Scope scope(c.Name());
  Problem problem(c);
  problem.Run();
  if (!c.in_place) {
    problem.out.Download();
    problem.Check(problem.out);
    return;
  }
  const Problem untouched(c);  // the same numbers
  problem.x.Download();
  untouched.Check(problem.x);
}

}  // namespace flashtrain
