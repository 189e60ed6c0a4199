// Counter-based random numbers: Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3", SC11). Host and device give the same bits.
//
// The number of element (row, col) of an op is a pure function of (seed, offset, row, col),
// whatever the launch geometry or thread count:
//
//   key     = seed (64 bits)
//   counter = {col / 4, row low, offset low, offset high + row high}
//   element = word col % 4 of the block
//
// Two calls draw independent numbers when their (seed, offset) differ; col must be below 2^34.
#pragma once

#include <cstdint>

#include "flashtrain/common/host_device.h"

namespace flashtrain {

struct Philox4 {
  uint32_t word[4];
};

// One block of four 32-bit words.
FLASHTRAIN_HOST_DEVICE Philox4 PhiloxBlock(uint64_t seed, uint64_t offset, int64_t row,
                                           uint32_t col_group) {
  constexpr uint32_t kMul0 = 0xD2511F53u, kMul1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = col_group;
  uint32_t c1 = static_cast<uint32_t>(row);
  uint32_t c2 = static_cast<uint32_t>(offset);
  uint32_t c3 =
      static_cast<uint32_t>(offset >> 32) + static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32);
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kMul0) * c0;
    const uint64_t product1 = static_cast<uint64_t>(kMul1) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// An element is kept when its word is at least this threshold: P(drop) = p to within 2^-32.
FLASHTRAIN_HOST_DEVICE uint32_t DropoutThreshold(float p) {
  const double scaled = static_cast<double>(p) * 4294967296.0;
  return scaled >= 4294967295.0 ? 4294967295u : static_cast<uint32_t>(scaled);
}

}  // namespace flashtrain
