// Internal: which row of the tables a token takes, for CPU and CUDA alike.
#pragma once

#include <cstdint>

#include "flashtrain/rotary/rotary.h"

#if defined(__CUDACC__)
#define FLASHTRAIN_ROTARY_INLINE __host__ __device__ __forceinline__
#else
#define FLASHTRAIN_ROTARY_INLINE inline __attribute__((always_inline))
#endif

namespace flashtrain {

// What becomes of a token; see "Positions" in rotary.h.
enum class RotaryToken : int8_t { kRotate, kCopy, kOutsideTable };

struct RotaryPosition {
  RotaryToken token;
  int64_t position;
};

FLASHTRAIN_ROTARY_INLINE int64_t RotaryIndex(const RotaryParams& p, const void* base, int64_t i) {
  return p.index_is_int32 ? static_cast<const int32_t*>(base)[i]
                          : static_cast<const int64_t*>(base)[i];
}

// The sequence that holds the token: the last one that starts at or before it and is not empty.
FLASHTRAIN_ROTARY_INLINE int64_t RotarySequence(const RotaryParams& p, int64_t token) {
  int64_t low = 0, high = p.num_sequences;  // cu_seqlens[low] <= token < cu_seqlens[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (RotaryIndex(p, p.cu_seqlens, middle) <= token) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Modulo 2^64, as indices may be any integers: the sum of a token's number and one offset that
// leaves 64 bits comes out far from the tables, on the other side.
FLASHTRAIN_ROTARY_INLINE int64_t RotaryAdd(int64_t a, int64_t b) {
  return static_cast<int64_t>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
}

FLASHTRAIN_ROTARY_INLINE RotaryPosition FindRotaryPosition(const RotaryParams& p, int64_t batch,
                                                           int64_t token) {
  int64_t position;
  if (p.position_ids != nullptr) {
    position = RotaryIndex(p, p.position_ids,
                           batch * p.position_batch_stride + token * p.position_seq_stride);
  } else {
    int64_t sequence = batch;
    position = token;
    if (p.cu_seqlens != nullptr) {
      if (p.num_sequences == 0 || token >= RotaryIndex(p, p.cu_seqlens, p.num_sequences)) {
        return {RotaryToken::kCopy, 0};
      }
      sequence = RotarySequence(p, token);
      position = RotaryAdd(position, ~RotaryIndex(p, p.cu_seqlens, sequence));  // -1 - start
      position = RotaryAdd(position, 1);
    }
    position = RotaryAdd(position, p.seqlen_offset);
    if (p.seqlen_offsets != nullptr) {
      position = RotaryAdd(position, RotaryIndex(p, p.seqlen_offsets, sequence));
    }
  }
  const bool inside = position >= 0 && position < p.table_len;
  return {inside ? RotaryToken::kRotate : RotaryToken::kOutsideTable, position};
}

}  // namespace flashtrain
