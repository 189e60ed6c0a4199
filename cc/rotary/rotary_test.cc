// Drives rotary.h on the device under test (CPU or CUDA, by what is linked) against fp64.
#include "flashtrain/rotary/rotary.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "flashtrain/common/test_memory.h"
#include "flashtrain/common/test_tensor.h"
#include "flashtrain/common/testing.h"
#include "flashtrain/rotary/rotary_test_problem.h"

namespace flashtrain {
namespace {

TEST(HeadDims) {
  const int64_t dims[][2] = {{2, 2},   {3, 2},     {7, 6},    {16, 16},   {32, 16},
                             {64, 64}, {64, 32},   {80, 80},  {80, 40},   {96, 96},
                             {96, 48}, {128, 128}, {128, 64}, {129, 128}, {256, 256},
                             {72, 64}, {512, 512}, {100, 20}, {2048, 34}};
  for (const auto& dim : dims) {
    for (const DType dtype : {kF32, kBF16}) {
      for (const bool interleaved : {false, true}) {
        for (const bool in_place : {false, true}) {
          Case c;
          c.head_dim = dim[0], c.rotary_dim = dim[1], c.dtype = dtype;
          c.interleaved = interleaved, c.in_place = in_place;
          CheckCase(c);
        }
      }
    }
  }
}

TEST(HeadsAndTokens) {
  for (const std::vector<int64_t>& heads : std::vector<std::vector<int64_t>>{
           {1}, {4}, {5}, {9, 3}, {12, 12, 12}, {0, 2}, {2, 0, 3}, {1, 1, 1}, {70, 1}}) {
    for (const int64_t seqlen : {1, 2, 33}) {
      for (const int64_t batch : {1, 3}) {
        Case c;
        c.heads = heads, c.seqlen = seqlen, c.batch = batch, c.dtype = kBF16;
        CheckCase(c);
        c.in_place = true, c.conjugate = true;
        CheckCase(c);
      }
    }
  }
  Case wide;  // more slices of heads than a CTA has threads
  wide.heads = {300, 40}, wide.head_dim = wide.rotary_dim = 128, wide.dtype = kF16;
  CheckCase(wide);
}

TEST(DTypes) {
  for (const DType dtype : {kF32, kF16, kBF16}) {
    for (const DType table : {dtype, kF32}) {
      for (const int64_t rotary_dim : {64, 40, 38}) {
        for (const bool conjugate : {false, true}) {
          Case c;
          c.dtype = dtype, c.table = table, c.rotary_dim = rotary_dim, c.conjugate = conjugate;
          CheckCase(c);
        }
      }
    }
  }
}

TEST(Positions) {
  for (const Positions positions : {Positions::kPlain, Positions::kOffsets, Positions::kSequences,
                                    Positions::kSequencesAndOffsets, Positions::kIds}) {
    for (const bool int32 : {false, true}) {
      for (const bool in_place : {false, true}) {
        Case c;
        c.positions = positions, c.int32 = int32, c.in_place = in_place, c.dtype = kBF16;
        CheckCase(c);
        c.seqlen_offset = positions == Positions::kIds ? 0 : 7;
        c.batch = 1, c.seqlen = 11;
        CheckCase(c);
        c.seqlen = 1;
        CheckCase(c);
      }
    }
  }
  Case last;  // the last row of the tables
  last.seqlen_offset = kTableLen - last.seqlen;
  CheckCase(last);
}

TEST(StridesAndAlignment) {
  for (const DType dtype : {kF32, kBF16}) {
    for (const int64_t padding : {0, 1, 4, 8}) {
      for (const int64_t offset : {0, 1, 4}) {
        for (const int64_t gap : {0, 1, 4, 64}) {
          Case c;
          c.dtype = dtype, c.head_gap = gap;
          c.layout.padding = padding, c.layout.offset = offset;
          CheckCase(c);
          c.in_place = true;
          CheckCase(c);
        }
        Case c;
        c.dtype = c.table = dtype;
        c.table_layout.padding = padding, c.table_layout.offset = offset;
        CheckCase(c);
      }
    }
  }
}

// Tokens further apart than 2^31 elements.
TEST(LargeOffsets) {
  Case c;
  c.batch = 3, c.seqlen = 1, c.dtype = kBF16, c.in_place = true;
  c.layout.padding = (int64_t{1} << 30) + 8;
  CheckCase(c);
}

TEST(NonFiniteValuesStayInTheirPair) {
  for (const double bad :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    Case c;
    c.rotary_dim = 32;
    Problem problem(c);
    problem.x.Set(2, 64 + 3, bad);  // head 1, pair 3
    problem.Run();
    problem.out.Download();
    for (int64_t row = 0; row < 10; ++row) {
      for (int64_t col = 0; col < 6 * 64; ++col) {
        const bool of_pair = row == 2 && (col == 64 + 3 || col == 64 + 19);
        EXPECT(std::isfinite(problem.out.At(row, col)) != of_pair) << row << ", " << col;
      }
    }
  }
}

TEST(NoElements) {
  for (const bool no_batch : {false, true}) {
    RotaryParams p;
    p.batch = no_batch ? 0 : 2, p.seqlen = no_batch ? 2 : 0, p.head_dim = p.rotary_dim = 8;
    p.num_parts = 1, p.parts[0].heads = 3;
    EXPECT(Rotary(p, TestDevice(), nullptr).ok());
    p.batch = p.seqlen = 2, p.parts[0].heads = 0, p.table_len = 2, p.table_row_stride = 4;
    EXPECT(Rotary(p, TestDevice(), nullptr).ok());
  }
}

TEST(PositionsOutsideTheTables) {
  for (const Positions positions : {Positions::kOffsets, Positions::kSequencesAndOffsets}) {
    for (const int64_t offset : {int64_t{-4}, kTableLen - 5}) {
      Case c;
      c.positions = positions, c.seqlen_offset = offset, c.rotary_dim = 32, c.dtype = kBF16;
      const Scope scope(c.Name());
      Problem problem(c);
      const Status status = Rotary(problem.Params(), TestDevice(), nullptr);
      testing::Synchronize();
      problem.out.Download();
      if (TestDevice().type == DeviceType::kCpu) {
        EXPECT(status.message().find("the tables hold positions 0 to 39") != std::string::npos)
            << status.message();
        EXPECT(std::isnan(problem.out.At(0, 0)) && std::isnan(problem.out.At(9, 40)));
        continue;
      }
      EXPECT(status.ok()) << status.message();
      int outside = 0;
      for (int64_t row = 0; row < 10; ++row) {
        const int64_t position = problem.PositionOf(row);
        const bool copied = row >= 8 && positions == Positions::kSequencesAndOffsets;
        const bool bad = !copied && (position < 0 || position >= kTableLen);
        outside += bad;
        for (int64_t head = 0; head < 6; ++head) {
          EXPECT(std::isnan(problem.out.At(row, 64 * head)) == (bad && head < 5));
          EXPECT(problem.out.At(row, 64 * head + 40) == problem.x.At(row, 64 * head + 40));
        }
      }
      EXPECT(outside > 0);
    }
  }
}

template <typename Change>
void ExpectError(const std::string& expected, Change change) {
  const Case c;
  Problem problem(c);
  RotaryParams p = problem.Params();
  change(p);
  const Status status = Rotary(p, TestDevice(), nullptr);
  EXPECT(status.code() == StatusCode::kInvalidArgument) << "no error about " << expected;
  EXPECT(status.message().find("Rotary: " + expected) == 0) << status.message();
}

TEST(ErrorsNameTheArgument) {
  using P = RotaryParams;
  ExpectError("batch is -1; it must be at least 0", [](P& p) { p.batch = -1; });
  ExpectError("rotary_dim is 63; it must be even", [](P& p) { p.rotary_dim = 63; });
  ExpectError("rotary_dim is 66; it must be even, and from 2 to head_dim = 64",
              [](P& p) { p.rotary_dim = 66; });
  ExpectError("num_parts is 4; it must be from 1 to 3", [](P& p) { p.num_parts = 4; });
  ExpectError("dtype is unknown dtype (9)", [](P& p) { p.dtype = static_cast<DType>(9); });
  ExpectError("table_dtype is bfloat16 (2); supported here: float32",
              [](P& p) { p.table_dtype = kBF16; });
  ExpectError("table_row_stride is 31", [](P& p) { p.table_row_stride = 31; });
  ExpectError("parts[1].x is null", [](P& p) { p.parts[1].x = nullptr; });
  ExpectError("parts[0].cos and sin: one is null", [](P& p) { p.parts[0].sin = nullptr; });
  ExpectError("parts[0].out is x, with other strides", [](P& p) {
    p.parts[0].out = const_cast<void*>(p.parts[0].x);
    p.parts[0].out_seq_stride += 8;
  });
  ExpectError("seqlen_offset: positions 36 to 40; the tables hold positions 0 to 39",
              [](P& p) { p.seqlen_offset = 36; });
  ExpectError("seqlen_offset: positions -1 to 3;", [](P& p) { p.seqlen_offset = -1; });
  ExpectError("seqlen_offset is 9223372036854775807; the tables hold positions 0 to 39",
              [](P& p) { p.seqlen_offset = std::numeric_limits<int64_t>::max(); });
  ExpectError("batch, seqlen, parts[0].heads, head_dim: got ",
              [](P& p) { p.parts[0].heads = int64_t{1} << 60; });
  ExpectError("batch is 2; it must be 1 with cu_seqlens",
              [](P& p) { p.cu_seqlens = p.parts[0].x; });
  ExpectError("seqlen_offset is 1; it must be 0 with position_ids", [](P& p) {
    p.position_ids = p.parts[0].x;
    p.seqlen_offset = 1;
  });
  ExpectError("cu_seqlens must be null with position_ids",
              [](P& p) { p.cu_seqlens = p.position_ids = p.parts[0].x; });
}

}  // namespace
}  // namespace flashtrain
