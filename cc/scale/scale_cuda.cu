#include <cuda_runtime.h>

#include <algorithm>

#include "flashtrain/common/cuda_host.h"
#include "flashtrain/common/vec.cuh"
#include "flashtrain/scale/scale_cuda.h"

namespace flashtrain {
namespace {

// 4 elements are 8 or 16 bytes of either dtype; kUnroll of them are loaded before any is used.
constexpr int kN = 4, kUnroll = 4, kThreads = 256;

template <typename X, typename Y>
__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ ScaleParams p) {
  const float factor = *p.factor;
  const int64_t vecs = p.count / kN, stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const auto* x = static_cast<const RawVec<X, kN>*>(p.x);
  for (int64_t v = static_cast<int64_t>(blockIdx.x) * kThreads * kUnroll + threadIdx.x; v < vecs;
       v += stride * kUnroll) {
    RawVec<X, kN> raw[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (v + u * kThreads < vecs) raw[u] = x[v + u * kThreads];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (v + u * kThreads >= vecs) continue;
      float values[kN];
      ToFloat(raw[u], values);
#pragma unroll
      for (int i = 0; i < kN; ++i) values[i] *= factor;
      StoreVec<Y>(values, p.y, (v + u * kThreads) * kN);
    }
  }
  const int64_t tail = vecs * kN + threadIdx.x;
  if (blockIdx.x == 0 && tail < p.count) {
    StoreScalar(factor * LoadScalar(p.x, p.x_dtype, tail), p.y, p.y_dtype, tail);
  }
}

// For pointers that are not aligned.
__global__ void __launch_bounds__(kThreads)
    scale_general_kernel(const __grid_constant__ ScaleParams p) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.count;
       i += stride) {
    StoreScalar(*p.factor * LoadScalar(p.x, p.x_dtype, i), p.y, p.y_dtype, i);
  }
}

using Kernel = void (*)(ScaleParams);

template <typename X>
Kernel KernelOf(DType y) {
  switch (y) {
    case DType::kFloat16:
      return scale_kernel<X, __half>;
    case DType::kBFloat16:
      return scale_kernel<X, __nv_bfloat16>;
    default:
      return scale_kernel<X, float>;
  }
}

Kernel KernelOf(const ScaleParams& p) {
  const auto aligned = [](const void* ptr, DType dtype) {
    return IsAlignedTo(ptr, kN * DTypeSize(dtype));
  };
  if (!aligned(p.x, p.x_dtype) || !aligned(p.y, p.y_dtype)) return scale_general_kernel;
  switch (p.x_dtype) {
    case DType::kFloat16:
      return KernelOf<__half>(p.y_dtype);
    case DType::kBFloat16:
      return KernelOf<__nv_bfloat16>(p.y_dtype);
    default:
      return KernelOf<float>(p.y_dtype);
  }
}

}  // namespace

Status ScaleCuda(const ScaleParams& p, void* stream) {
  if (p.count == 0) return Status();
  constexpr int64_t kPerCta = kThreads * kUnroll * kN, kMaxCtas = 0x7FFFFFFF;
  const auto ctas = static_cast<unsigned>(std::min(CeilDivide(p.count, kPerCta), kMaxCtas));
  KernelOf(p)<<<ctas, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return FromCuda(cudaGetLastError(), "Scale", "launch");
}

}  // namespace flashtrain
