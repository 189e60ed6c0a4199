#include "cc/scaled_norm.h"

namespace consumer {
namespace {

__global__ void scale_kernel(float* x, int64_t size, float scale) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i < size) x[i] *= scale;
}

}  // namespace

flashtrain::Status ScaledNorm(const flashtrain::LayerNormForwardParams& params, float scale,
                              cudaStream_t stream) {
  FLASHTRAIN_RETURN_IF_ERROR(
      flashtrain::LayerNormForward(params, flashtrain::Device::Cuda(), stream));
  const int64_t size = params.rows * params.cols;
  scale_kernel<<<static_cast<unsigned>((size + 255) / 256), 256, 0, stream>>>(
      static_cast<float*>(params.z), size, scale);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? flashtrain::Status()
                              : flashtrain::Status::Internal(cudaGetErrorString(error));
}

}  // namespace consumer
