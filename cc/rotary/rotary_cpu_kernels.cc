// One thread's share of the CPU path. Compiled once per instruction set: FLASHTRAIN_CPU_ISA_NAME is
// Baseline, V3 or V4.
#include <cstdint>
#include <cstring>

#include "flashtrain/common/cpu_row.h"
#include "flashtrain/rotary/rotary_cpu.h"
#include "flashtrain/rotary/rotary_position.h"

namespace flashtrain {
namespace {

struct Angles {
  const float* cos;
  const float* sin;
};

// A row of the tables in fp32. buffer: [rotary_dim].
Angles LoadAngles(const RotaryParams& p, const RotaryPart& part, int64_t position, float* buffer) {
  const int64_t half = p.rotary_dim / 2, offset = position * p.table_row_stride;
  const Angles angles = {LoadFloat(part.cos, p.table_dtype, offset, half, buffer),
                         LoadFloat(part.sin, p.table_dtype, offset, half, buffer + half)};
  if (!p.conjugate) return angles;
  float* negated = buffer + half;
  for (int64_t i = 0; i < half; ++i) negated[i] = -angles.sin[i];
  return {angles.cos, negated};
}

void RotateHalves(const float* __restrict__ x, const Angles& angles, int64_t half,
                  float* __restrict__ out) {
  const float* __restrict__ cos = angles.cos;
  const float* __restrict__ sin = angles.sin;
  for (int64_t i = 0; i < half; ++i) {
    out[i] = x[i] * cos[i] - x[half + i] * sin[i];
    out[half + i] = x[half + i] * cos[i] + x[i] * sin[i];
  }
}

void RotateNeighbours(const float* __restrict__ x, const Angles& angles, int64_t half,
                      float* __restrict__ out) {
  const float* __restrict__ cos = angles.cos;
  const float* __restrict__ sin = angles.sin;
  for (int64_t i = 0; i < half; ++i) {
    out[2 * i] = x[2 * i] * cos[i] - x[2 * i + 1] * sin[i];
    out[2 * i + 1] = x[2 * i + 1] * cos[i] + x[2 * i] * sin[i];
  }
}

void CopyElements(const RotaryParams& p, const RotaryPart& part, int64_t x_offset,
                  int64_t out_offset, int64_t n) {
  if (part.x == part.out) return;
  const int64_t size = DTypeSize(p.dtype);
  std::memcpy(static_cast<char*>(part.out) + out_offset * size,
              static_cast<const char*>(part.x) + x_offset * size, n * size);
}

// All heads of one token of a part. scratch: [3 * rotary_dim].
void RotatePart(const RotaryParams& p, const RotaryPart& part, int64_t batch, int64_t token,
                const RotaryPosition& at, float* scratch) {
  const bool rotate = part.cos != nullptr && at.token == RotaryToken::kRotate;
  const int64_t rotated = rotate ? p.rotary_dim : 0;
  float* x_buffer = scratch + p.rotary_dim;
  float* out_buffer = x_buffer + p.rotary_dim;
  Angles angles = {};
  if (rotate) angles = LoadAngles(p, part, at.position, scratch);
  for (int64_t head = 0; head < part.heads; ++head) {
    const int64_t x_offset =
        batch * part.x_batch_stride + token * part.x_seq_stride + head * part.x_head_stride;
    const int64_t out_offset =
        batch * part.out_batch_stride + token * part.out_seq_stride + head * part.out_head_stride;
    if (rotate) {
      const float* x = LoadFloat(part.x, p.dtype, x_offset, rotated, x_buffer);
      (p.interleaved ? RotateNeighbours : RotateHalves)(x, angles, rotated / 2, out_buffer);
      StoreFloat(out_buffer, rotated, part.out, p.dtype, out_offset);
    }
    CopyElements(p, part, x_offset + rotated, out_offset + rotated, p.head_dim - rotated);
  }
}

void RotateTokens(const RotaryParams& p, int64_t begin, int64_t end, float* scratch) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t batch = row / p.seqlen, token = row % p.seqlen;
    const RotaryPosition at = FindRotaryPosition(p, batch, token);
    for (int i = 0; i < p.num_parts; ++i) RotatePart(p, p.parts[i], batch, token, at, scratch);
  }
}

}  // namespace

#define FLASHTRAIN_CONCAT_(a, b) a##b
#define FLASHTRAIN_CONCAT(a, b) FLASHTRAIN_CONCAT_(a, b)
const RotaryCpuKernels FLASHTRAIN_CONCAT(kRotaryCpuKernels,
                                         FLASHTRAIN_CPU_ISA_NAME) = {RotateTokens};

}  // namespace flashtrain
