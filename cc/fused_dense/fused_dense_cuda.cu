// Launches of the passes.
#include <cuda_runtime.h>

#include <algorithm>

#include "flashtrain/common/cuda_host.h"
#include "flashtrain/fused_dense/fused_dense_cuda.h"
#include "flashtrain/fused_dense/fused_dense_kernel.cuh"

namespace flashtrain {
namespace {

constexpr char kOp[] = "fused_dense";

bool IsAligned(const void* ptr) { return IsAlignedTo(ptr, 16); }

bool IsVectorizable(const DenseActivationForwardParams& p) {
  return p.cols * DTypeSize(p.dtype) % 16 == 0 && IsAligned(p.x) && IsAligned(p.bias) &&
         IsAligned(p.pre_act) && IsAligned(p.out);
}

bool IsVectorizable(const DenseActivationBackwardParams& p) {
  return p.cols * DTypeSize(p.dtype) % 16 == 0 && IsAligned(p.dout) && IsAligned(p.pre_act) &&
         IsAligned(p.dx);
}

// CTAs for each strip of columns. Enough in all to fill the largest devices (8 for each of about
// 150 multiprocessors), and a function of the shape alone: sums over rows must not depend on which
// path is taken, nor on the device's size.
int64_t RowCtas(int64_t rows, int64_t cols, DType dtype) {
  constexpr int64_t kCtas = 1200;
  const int64_t strips = CeilDivide(cols * DTypeSize(dtype), 16 * kColumnThreads);
  return std::clamp<int64_t>(kCtas / strips, 1, std::max<int64_t>(1, CeilDivide(rows, 8)));
}

template <int kVec, typename Params>
dim3 Grid(const Params& p) {
  return dim3(static_cast<unsigned>(CeilDivide(p.cols, kColumnThreads * kVec)),
              static_cast<unsigned>(RowCtas(p.rows, p.cols, p.dtype)));
}

const dim3 kBlock(kColumnThreads, kRowThreads);

template <typename T>
cudaError_t Forward(const DenseActivationForwardParams& p, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(T);
  if (IsVectorizable(p)) {
    dense_activation_forward_kernel<T, kVec><<<Grid<kVec>(p), kBlock, 0, stream>>>(p);
  } else {
    dense_activation_forward_kernel<T, 1><<<Grid<1>(p), kBlock, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t Backward(const DenseActivationBackwardParams& p, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(T);
  int count = 0;
  if (p.rows > 0) {
    count = static_cast<int>(RowCtas(p.rows, p.cols, p.dtype));
    if (IsVectorizable(p)) {
      dense_activation_backward_kernel<T, kVec><<<Grid<kVec>(p), kBlock, 0, stream>>>(p);
    } else {
      dense_activation_backward_kernel<T, 1><<<Grid<1>(p), kBlock, 0, stream>>>(p);
    }
    if (cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  if (p.dbias == nullptr) return cudaSuccess;
  const auto ctas = static_cast<unsigned>(CeilDivide(p.cols, kColumnThreads));
  dense_bias_gradient_kernel<T><<<ctas, kBlock, 0, stream>>>(p, count);
  return cudaGetLastError();
}

// Calls `function` with a value of the C++ type of `dtype`.
template <typename Function>
cudaError_t WithType(DType dtype, Function function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(float{});
    case DType::kFloat16:
      return function(__half{});
    case DType::kBFloat16:
      return function(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace

Status DenseActivationForwardCuda(const DenseActivationForwardParams& p, void* stream) {
  if (p.rows == 0) return Status();
  const cudaError_t error = WithType(p.dtype, [&](auto type) {
    return Forward<decltype(type)>(p, static_cast<cudaStream_t>(stream));
  });
  return FromCuda(error, kOp, "forward launch");
}

int64_t DenseActivationBackwardWorkspaceBytesCuda(const DenseActivationBackwardParams& p) {
  if (p.dbias == nullptr || p.rows == 0) return 0;
  return RowCtas(p.rows, p.cols, p.dtype) * p.cols * static_cast<int64_t>(sizeof(float));
}

Status DenseActivationBackwardCuda(const DenseActivationBackwardParams& p, void* stream) {
  const cudaError_t error = WithType(p.dtype, [&](auto type) {
    return Backward<decltype(type)>(p, static_cast<cudaStream_t>(stream));
  });
  return FromCuda(error, kOp, "backward launch");
}

}  // namespace flashtrain
