// Sums over a warp and over a group of warps, the same value in every thread and in a fixed order.
#pragma once

#include <cstdint>

namespace flashtrain {

__device__ __forceinline__ float WarpSum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, mask);
  return value;
}

// The sum of the results of `warps` warps, at most 32. Many are added in pairs: one after the
// other, half of them would be rounded as the whole sum is.
__device__ __forceinline__ float SumOfWarps(const float* values, int warps) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (warps > 4) return WarpSum(lane < warps ? values[lane] : 0.0f);
  float sum = 0.0f;
  for (int i = 0; i < warps; ++i) sum += values[i];
  return sum;
}

// A CTA's warps in groups of `warps` consecutive ones. All groups must call Sum together: it
// synchronises the CTA unless a group is one warp.
struct RowWarps {
  static constexpr int kMaxWarps = 16;

  int warps;   // in this group
  int index;   // of this group in the CTA
  int thread;  // of the calling thread in its group

  __device__ __forceinline__ explicit RowWarps(int warps_per_group)
      : warps(warps_per_group),
        index(static_cast<int>(threadIdx.x) / (32 * warps_per_group)),
        thread(static_cast<int>(threadIdx.x) % (32 * warps_per_group)) {}

  // Of a CTA of (threads of a group, groups) threads: without a division before the first load.
  __device__ __forceinline__ RowWarps()
      : warps(static_cast<int>(blockDim.x) / 32),
        index(static_cast<int>(threadIdx.y)),
        thread(static_cast<int>(threadIdx.x)) {}

  __device__ __forceinline__ int size() const { return 32 * warps; }

  // `shared`: kMaxWarps floats of shared memory of this group's own. It may be used again by a call
  // with another buffer in between: the barrier of that call orders this one's reads.
  __device__ __forceinline__ float Sum(float value, float* shared) const {
    value = WarpSum(value);
    if (warps == 1) return value;
    if (thread % 32 == 0) shared[thread / 32] = value;
    __syncthreads();
    return SumOfWarps(shared, warps);
  }

  // Two sums for one barrier.
  __device__ __forceinline__ float2 Sum2(float2 value, float2* shared) const {
    value.x = WarpSum(value.x);
    value.y = WarpSum(value.y);
    if (warps == 1) return value;
    if (thread % 32 == 0) shared[thread / 32] = value;
    __syncthreads();
    float2 sum = make_float2(0.0f, 0.0f);
    for (int i = 0; i < warps; ++i) {
      sum.x += shared[i].x;
      sum.y += shared[i].y;
    }
    return sum;
  }
};

}  // namespace flashtrain
