#include "flashtrain/common/cpu_isa.h"

#include <cpuid.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace flashtrain {
namespace {

// CPUID by hand: __builtin_cpu_supports needs a symbol that not every compiler runtime has.
struct CpuidResult {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

CpuidResult Cpuid(uint32_t leaf) {
  CpuidResult r;
  __get_cpuid_count(leaf, 0, &r.a, &r.b, &r.c, &r.d);
  return r;
}

// XCR0: which register states the operating system saves.
uint64_t ReadXcr0() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

constexpr bool HasAll(uint64_t value, uint64_t bits) { return (value & bits) == bits; }
constexpr uint32_t Bit(int n) { return 1u << n; }

CpuIsa DetectCpuIsa() {
  constexpr uint32_t kV3Leaf1 =
      Bit(12) | Bit(22) | Bit(27) | Bit(28) | Bit(29);     // ecx: FMA MOVBE OSXSAVE AVX F16C
  constexpr uint32_t kV3Leaf7 = Bit(3) | Bit(5) | Bit(8);  // ebx: BMI1 AVX2 BMI2
  constexpr uint32_t kV3Ext1 = Bit(5);                     // ecx: LZCNT
  constexpr uint32_t kV4Leaf7 =
      Bit(16) | Bit(17) | Bit(28) | Bit(30) | Bit(31);  // ebx: AVX512 F DQ CD BW VL
  constexpr uint64_t kAvxState = 0x6, kAvx512State = 0xE6;
  const uint32_t leaf1 = Cpuid(1).c, leaf7 = Cpuid(7).b, ext1 = Cpuid(0x80000001u).c;
  if (!HasAll(leaf1, kV3Leaf1) || !HasAll(leaf7, kV3Leaf7) || !HasAll(ext1, kV3Ext1)) {
    return CpuIsa::kBaseline;
  }
  const uint64_t xcr0 = ReadXcr0();
  if (!HasAll(xcr0, kAvxState)) return CpuIsa::kBaseline;
  const bool v4 = HasAll(leaf7, kV4Leaf7) && HasAll(xcr0, kAvx512State);
  return v4 ? CpuIsa::kX86_64_V4 : CpuIsa::kX86_64_V3;
}

CpuIsa AllowedCpuIsa() {
  const char* limit = std::getenv("FLASHTRAIN_CPU_ISA");
  if (limit != nullptr && std::strcmp(limit, "baseline") == 0) return CpuIsa::kBaseline;
  if (limit != nullptr && std::strcmp(limit, "v3") == 0) return CpuIsa::kX86_64_V3;
  return CpuIsa::kX86_64_V4;
}

}  // namespace

CpuIsa GetCpuIsa() {
  static const CpuIsa isa = std::min(DetectCpuIsa(), AllowedCpuIsa());
  return isa;
}

}  // namespace flashtrain
