// The instruction set of the running CPU, in the x86-64 psABI's levels.
//
// A CPU kernel's source is compiled once per level (-march=x86-64, -v3, -v4) with
// FLASHTRAIN_CPU_ISA_NAME naming its entry points, and the op picks one by GetCpuIsa().
#pragma once

namespace flashtrain {

enum class CpuIsa {
  kBaseline,   // x86-64: SSE2
  kX86_64_V3,  // AVX2, FMA, F16C, BMI2
  kX86_64_V4,  // AVX-512 F, BW, CD, DQ, VL
};

// Found once, by CPUID and the registers the operating system saves.
// FLASHTRAIN_CPU_ISA=baseline|v3|v4 in the environment lowers it, for tests.
CpuIsa GetCpuIsa();

}  // namespace flashtrain
