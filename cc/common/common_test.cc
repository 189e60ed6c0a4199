#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "flashtrain/common/cpu_isa.h"
#include "flashtrain/common/cpu_row.h"
#include "flashtrain/common/parallel.h"
#include "flashtrain/common/philox.h"
#include "flashtrain/common/testing.h"

namespace flashtrain {
namespace {

// The vectors of the Random123 distribution (kat_vectors, philox4x32 with 10 rounds), whose
// counters are {col / 4, row, offset low, offset high} here.
TEST(PhiloxMatchesPublishedVectors) {
  const Philox4 zeros = PhiloxBlock(0, 0, 0, 0);
  const uint32_t expected_zeros[4] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
  const Philox4 pi = PhiloxBlock(0x299f31d0a4093822, 0x0370734413198a2e, 0x85a308d3, 0x243f6a88);
  const uint32_t expected_pi[4] = {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1};
  for (int i = 0; i < 4; ++i) {
    EXPECT(zeros.word[i] == expected_zeros[i]) << zeros.word[i];
    EXPECT(pi.word[i] == expected_pi[i]) << pi.word[i];
  }
}

TEST(HalfConversionsAreExact) {
  for (uint32_t h = 0; h < 65536; ++h) {
    const uint16_t half = static_cast<uint16_t>(h);
    const int exponent = (h >> 10) & 31, mantissa = h & 1023;
    const double sign = h & 0x8000 ? -1.0 : 1.0;
    const float value = HalfToFloat(half);
    if (exponent == 31 && mantissa != 0) {
      EXPECT(std::isnan(value) && std::isnan(HalfToFloat(FloatToHalf(value)))) << h;
      continue;
    }
    const double expected = exponent == 31  ? sign * std::numeric_limits<double>::infinity()
                            : exponent == 0 ? sign * std::ldexp(mantissa, -24)
                                            : sign * std::ldexp(1024 + mantissa, exponent - 25);
    EXPECT(value == expected) << h << " gave " << value;
    EXPECT(FloatToHalf(value) == half) << h;
    // Halfway to the next value rounds to even; just past it rounds up.
    if (exponent == 31 || (h & 0x7FFF) == 0x7BFF) continue;
    const float next = HalfToFloat(static_cast<uint16_t>(h + 1));
    const float middle = (value + next) / 2;
    EXPECT(FloatToHalf(middle) == (half & 1 ? half + 1 : half)) << h;
    EXPECT(FloatToHalf(std::nextafter(middle, next)) == half + 1) << h;
  }
  EXPECT(FloatToHalf(65520.0f) == 0x7C00);
  EXPECT(FloatToHalf(65519.0f) == 0x7BFF);
}

TEST(BFloat16RoundsToNearestEven) {
  EXPECT(FloatToBFloat16(1.0f) == 0x3F80);
  EXPECT(FloatToBFloat16(BitCast<float>(0x3F808000u)) == 0x3F80);
  EXPECT(FloatToBFloat16(BitCast<float>(0x3F818000u)) == 0x3F82);
  EXPECT(FloatToBFloat16(BitCast<float>(0x3F808001u)) == 0x3F81);
  EXPECT(FloatToBFloat16(std::numeric_limits<float>::max()) == 0x7F80);
  EXPECT(std::isnan(BFloat16ToFloat(FloatToBFloat16(BitCast<float>(0x7F800001u)))));
}

// Rows take a vector path that single values do not.
TEST(RowConversionsMatchSingleOnes) {
  constexpr int kCount = 1003;
  std::vector<float> values(kCount), loaded(kCount);
  for (int i = 0; i < kCount; ++i) values[i] = std::ldexp(1.0f + i / 1003.0f, i % 60 - 40);
  std::vector<uint16_t> raw(2 * kCount);
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    StoreFloat(values.data(), kCount, raw.data(), dtype, 0);
    LoadFloat(raw.data(), dtype, 0, kCount, loaded.data());
    for (int i = 0; i < kCount; ++i) {
      const bool half = dtype == DType::kFloat16;
      EXPECT(raw[i] == (half ? FloatToHalf(values[i]) : FloatToBFloat16(values[i]))) << i;
      EXPECT(loaded[i] == (half ? HalfToFloat(raw[i]) : BFloat16ToFloat(raw[i]))) << i;
    }
  }
}

void ExpectRunsEachTaskOnce(int64_t num_tasks) {
  std::vector<std::atomic<int>> runs(num_tasks);
  ParallelFor(num_tasks, [&](int64_t i) { ++runs[i]; });
  for (int64_t i = 0; i < num_tasks; ++i) EXPECT(runs[i] == 1) << "task " << i;
}

TEST(ParallelForRunsEachTaskOnce) {
  for (const int threads : {1, 2, 5, 3}) {
    SetNumThreads(threads);
    for (const int64_t num_tasks : {1, 2, 100, 1000}) ExpectRunsEachTaskOnce(num_tasks);
  }
  EXPECT(GetNumThreads() == 3);
}

TEST(ParallelForNestsAndSharesThePool) {
  SetNumThreads(4);
  std::atomic<int> count{0};
  ParallelFor(8, [&](int64_t) { ParallelFor(8, [&](int64_t) { ++count; }); });
  EXPECT(count == 64);
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&] {
      for (int n = 0; n < 200; ++n) ParallelFor(10, [&](int64_t) { ++count; });
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT(count == 64 + 4 * 200 * 10);
}

TEST(ParallelForWorksAfterFork) {
  SetNumThreads(3);
  ExpectRunsEachTaskOnce(100);
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // a deadlock ends as a signal
    std::atomic<int> count{0};
    ParallelFor(100, [&](int64_t) { ++count; });
    _exit(count == 100 ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status;
  ExpectRunsEachTaskOnce(100);
}

// A task's exception comes to the caller, the first one only, and the threads work on.
TEST(ParallelForThrowsWhatATaskThrows) {
  for (const int threads : {1, 3}) {
    SetNumThreads(threads);
    for (const int64_t failing : {0, 57, 99}) {
      std::string caught;
      try {
        ParallelFor(100, [&](int64_t i) {
          if (i >= failing) throw std::runtime_error("task");
        });
      } catch (const std::runtime_error& error) {
        caught = error.what();
      }
      EXPECT(caught == "task") << threads << " threads, " << failing;
      ExpectRunsEachTaskOnce(100);
    }
  }
}

TEST(ThreadCountsAreBounded) {
  SetNumThreads(100000);
  EXPECT(GetNumThreads() == kMaxThreads);
  SetNumThreads(-5);
  EXPECT(GetNumThreads() == 1);
}

// What was there before must not be trusted after a failed allocation.
TEST(ThreadScratchAfterAFailedAllocation) {
  ThreadScratch(1000)[999] = 1.0f;
  for (const int64_t count : {int64_t{1} << 45, std::numeric_limits<int64_t>::max(), int64_t{-1}}) {
    bool refused = false;
    try {
      ThreadScratch(count);
    } catch (const std::bad_alloc&) {
      refused = true;
    }
    EXPECT(refused) << count;
    float* scratch = ThreadScratch(1000);
    EXPECT(scratch != nullptr);
    if (scratch != nullptr) scratch[999] = 1.0f;
  }
}

TEST(ThreadScratchGrows) {
  float* scratch = ThreadScratch(10);
  EXPECT(reinterpret_cast<uintptr_t>(scratch) % 64 == 0);
  scratch = ThreadScratch(100000);
  scratch[99999] = 1.0f;
  EXPECT(ThreadScratch(10) == scratch);
}

TEST(CpuIsaIsFound) { EXPECT(GetCpuIsa() >= CpuIsa::kBaseline); }

}  // namespace
}  // namespace flashtrain
