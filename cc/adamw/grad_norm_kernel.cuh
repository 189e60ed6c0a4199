// The CUDA kernels of adamw.h's GradNorm: a CTA sums the squares of a chunk, and one CTA the
// chunks.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "flashtrain/adamw/adamw_cuda.h"
#include "flashtrain/common/vec.cuh"

namespace flashtrain {

struct GradNormRecord {
  const void* grad;
  int64_t numel;
  int32_t first_chunk;  // chunks of this launch's tensors before
  DType dtype;
  bool vectorizable;
};

// Tensors go by value: no memory to write them to beforehand. A kernel takes 32,764 bytes.
struct GradNormLaunch {
  static constexpr int kMaxTensors = 1024;

  double* partials;  // one for each chunk of this launch
  int num_tensors;
  GradNormRecord tensors[kMaxTensors];
};
static_assert(sizeof(GradNormLaunch) <= 32764, "a kernel's parameters");

__device__ __forceinline__ int FindTensor(const GradNormLaunch& launch, int chunk) {
  int low = 0, high = launch.num_tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (launch.tensors[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// This thread's part of the sum of squares of elements [begin, end), in vectors of 16 bytes.
template <typename T, int kUnroll>
__device__ __forceinline__ float SumVectors(const void* grad, int64_t begin, int64_t end) {
  constexpr int kN = 16 / sizeof(T);
  const int stride = kN * static_cast<int>(blockDim.x);
  float sum[kUnroll] = {};
  for (int64_t i = begin + kN * threadIdx.x; i < end; i += kUnroll * stride) {
    RawVec<T, kN> raw[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (i + u * stride >= end) break;
      raw[u] =
          *reinterpret_cast<const RawVec<T, kN>*>(static_cast<const T*>(grad) + i + u * stride);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (i + u * stride >= end) break;
      float x[kN];
      ToFloat(raw[u], x);
#pragma unroll
      for (int k = 0; k < kN; ++k) sum[u] += x[k] * x[k];
    }
  }
  float total = 0.0f;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) total += sum[u];
  return total;
}

// The sum over the CTA, valid in thread 0, in a fixed order.
template <int kThreads>
__device__ __forceinline__ double CtaSum(double value) {
  __shared__ double sums[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_down_sync(0xFFFFFFFFu, value, offset);
  }
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0.0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kThreads / 32; ++i) sum += sums[i];
  }
  return sum;
}

template <int kThreads, int kChunk, int kUnroll>
__global__ void __launch_bounds__(kThreads)
    grad_norm_kernel(const __grid_constant__ GradNormLaunch launch) {
  const int chunk = static_cast<int>(blockIdx.x);
  const GradNormRecord& t = launch.tensors[FindTensor(launch, chunk)];
  const int64_t begin = static_cast<int64_t>(chunk - t.first_chunk) * kChunk;
  const int64_t end = min(begin + kChunk, t.numel);
  int64_t done = begin;
  float sum = 0.0f;
  if (t.vectorizable) {
    done = begin + (end - begin) / 8 * 8;
    switch (t.dtype) {
      case DType::kFloat32:
        sum = SumVectors<float, kUnroll>(t.grad, begin, done);
        break;
      case DType::kFloat16:
        sum = SumVectors<__half, kUnroll>(t.grad, begin, done);
        break;
      default:
        sum = SumVectors<__nv_bfloat16, kUnroll>(t.grad, begin, done);
        break;
    }
  }
  for (int64_t i = done + threadIdx.x; i < end; i += kThreads) {
    const float x = LoadScalar(t.grad, t.dtype, i);
    sum += x * x;
  }
  const double total = CtaSum<kThreads>(sum);
  if (threadIdx.x == 0) launch.partials[chunk] = total;
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    grad_norm_finish_kernel(const double* partials, int64_t count, float* norm) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partials[i];
  const double total = CtaSum<kThreads>(sum);
  if (threadIdx.x == 0) *norm = static_cast<float>(sqrt(total));
}

}  // namespace flashtrain
