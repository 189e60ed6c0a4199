// Bias and activation as passes over memory, and sums over rows.
//
// A CTA takes a strip of kColumnThreads vectors of columns and, with kRowThreads rows at a time,
// every gridDim.y-th group of rows. So a warp reads 32 neighbouring vectors of a row, no thread
// divides an index, and the sum of a column stays in one CTA's registers until its end.
#pragma once

#include <cstdint>
#include <type_traits>

#include "flashtrain/common/vec.cuh"
#include "flashtrain/fused_dense/fused_dense.h"

namespace flashtrain {

constexpr int kColumnThreads = 32;
constexpr int kRowThreads = 8;
constexpr int kUnroll = 2;  // rows that a thread loads before it computes

// 2 sqrt(2/pi) and the cubic factor of GELU's tanh form.
constexpr float kGeluA = 1.5957691216057308f, kGeluB = 0.044715f;

// exp(-2 u): sigmoid(2 u) = 1 / (1 + e). For x far below 0 it is infinite and the sigmoid 0. The
// fast exponential is exact to 2^-20 or so, enough for what is rounded to 11 bits.
template <typename T>
__device__ __forceinline__ float GeluExp(float x) {
  const float argument = -kGeluA * (x + kGeluB * x * x * x);
  return sizeof(T) == 4 ? expf(argument) : __expf(argument);
}

// To 2 units in the last place, and 0 where 1 + e exceeds 2^126.
__device__ __forceinline__ float GeluSigmoid(float e) { return __fdividef(1.0f, 1.0f + e); }

// NaN is not <= 0 and stays.
template <typename T>
__device__ __forceinline__ float Activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kGeluApprox:
      return x * GeluSigmoid(GeluExp<T>(x));
    case Activation::kRelu:
      return x <= 0.0f ? 0.0f : x;
    case Activation::kSquaredRelu:
      return x <= 0.0f ? 0.0f : x * x;
    default:
      return x;
  }
}

// grad * activation'(x)
template <typename T>
__device__ __forceinline__ float ActivateBackward(Activation activation, float x, float grad) {
  switch (activation) {
    case Activation::kGeluApprox: {
      const float e = GeluExp<T>(x), s = GeluSigmoid(e);
      const float t = s * fminf(e, 3e38f);  // 1 - s without cancellation; 0 where s is
      return grad * (s + x * s * t * (kGeluA * (1.0f + 3.0f * kGeluB * x * x)));
    }
    case Activation::kRelu:
      return x <= 0.0f ? 0.0f : grad;
    case Activation::kSquaredRelu:
      return x <= 0.0f ? 0.0f : grad * 2.0f * x;
    default:
      return grad;
  }
}

// kVec elements, aligned together, still in their dtype: so that all loads of an iteration are
// under way before the first is used.
template <typename T, int kVec>
struct Elements {
  std::conditional_t<kVec == 1, T, RawVec<T, kVec>> raw;

  __device__ __forceinline__ void Load(const void* base, int64_t index) {
    raw = *reinterpret_cast<const decltype(raw)*>(static_cast<const T*>(base) + index);
  }
  __device__ __forceinline__ void Get(float (&out)[kVec]) const {
    if constexpr (kVec > 1) {
      ToFloat<T, kVec>(raw, out);
    } else {
      out[0] = static_cast<float>(raw);
    }
  }
};

template <typename T, int kVec>
__device__ __forceinline__ void Store(const float (&in)[kVec], void* base, int64_t index) {
  if constexpr (kVec > 1) {
    StoreVec<T, kVec>(in, base, index);
  } else {
    static_cast<T*>(base)[index] = static_cast<T>(in[0]);
  }
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kColumnThreads* kRowThreads)
    dense_activation_forward_kernel(const DenseActivationForwardParams p) {
  const int64_t col = (int64_t{blockIdx.x} * kColumnThreads + threadIdx.x) * kVec;
  if (col >= p.cols) return;
  float bias[kVec] = {};
  if (p.bias != nullptr) {
    Elements<T, kVec> loaded;
    loaded.Load(p.bias, col);
    loaded.Get(bias);
  }
  const int64_t step = int64_t{gridDim.y} * kRowThreads;
  int64_t row = int64_t{blockIdx.y} * kRowThreads + threadIdx.y;
  for (; row < p.rows; row += kUnroll * step) {
    Elements<T, kVec> loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (row + u * step < p.rows) loaded[u].Load(p.x, (row + u * step) * p.cols + col);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (row + u * step >= p.rows) break;
      const int64_t index = (row + u * step) * p.cols + col;
      float x[kVec], out[kVec];
      loaded[u].Get(x);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        // As separate ops would: backward reads the rounded value.
        if (p.bias != nullptr) x[i] = static_cast<float>(static_cast<T>(x[i] + bias[i]));
        out[i] = Activate<T>(p.activation, x[i]);
      }
      if (p.pre_act != nullptr) Store<T, kVec>(x, p.pre_act, index);
      if (p.out != nullptr) Store<T, kVec>(out, p.out, index);
    }
  }
}

// Partial sums go to the workspace, [gridDim.y, cols].
template <typename T, int kVec>
__global__ void __launch_bounds__(kColumnThreads* kRowThreads)
    dense_activation_backward_kernel(const DenseActivationBackwardParams p) {
  __shared__ float sums[kRowThreads][kColumnThreads * kVec];
  const int64_t col = (int64_t{blockIdx.x} * kColumnThreads + threadIdx.x) * kVec;
  const int64_t rows = col < p.cols ? p.rows : 0;
  float sum[kVec] = {};
  const int64_t step = int64_t{gridDim.y} * kRowThreads;
  int64_t row = int64_t{blockIdx.y} * kRowThreads + threadIdx.y;
  for (; row < rows; row += kUnroll * step) {
    Elements<T, kVec> loaded_grad[kUnroll], loaded_x[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (row + u * step >= rows) break;
      const int64_t index = (row + u * step) * p.cols + col;
      loaded_grad[u].Load(p.dout, index);
      if (p.activation != Activation::kIdentity) loaded_x[u].Load(p.pre_act, index);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (row + u * step >= rows) break;
      const int64_t index = (row + u * step) * p.cols + col;
      float grad[kVec], x[kVec] = {};
      loaded_grad[u].Get(grad);
      if (p.activation != Activation::kIdentity) loaded_x[u].Get(x);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        grad[i] = ActivateBackward<T>(p.activation, x[i], grad[i]);
        sum[i] += grad[i];
      }
      if (p.dx != nullptr) Store<T, kVec>(grad, p.dx, index);
    }
  }
  if (p.dbias == nullptr) return;
#pragma unroll
  for (int i = 0; i < kVec; ++i) sums[threadIdx.y][i * kColumnThreads + threadIdx.x] = sum[i];
  __syncthreads();
  if (threadIdx.y != 0 || col >= p.cols) return;
  float* partial = static_cast<float*>(p.workspace) + blockIdx.y * p.cols + col;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    float total = 0.0f;
    for (int r = 0; r < kRowThreads; ++r) total += sums[r][i * kColumnThreads + threadIdx.x];
    partial[i] = total;
  }
}

// dbias = the sum of `count` partials: a CTA's kRowThreads sums of each column, then theirs.
template <typename T>
__global__ void __launch_bounds__(kColumnThreads* kRowThreads)
    dense_bias_gradient_kernel(const DenseActivationBackwardParams p, int count) {
  __shared__ float sums[kRowThreads][kColumnThreads];
  const int64_t col = int64_t{blockIdx.x} * kColumnThreads + threadIdx.x;
  float sum = 0.0f;
  if (col < p.cols) {
    const float* partials = static_cast<const float*>(p.workspace) + col;
    for (int i = threadIdx.y; i < count; i += kRowThreads) sum += partials[i * p.cols];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || col >= p.cols) return;
  float total = 0.0f;
  for (int r = 0; r < kRowThreads; ++r) total += sums[r][threadIdx.x];
  static_cast<T*>(p.dbias)[col] = static_cast<T>(total);
}

}  // namespace flashtrain
