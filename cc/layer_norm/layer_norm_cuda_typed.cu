// The vectorised kernels of one dtype pair, compiled once per pair:
// FLASHTRAIN_A and FLASHTRAIN_B are the C++ types, FLASHTRAIN_TABLE the name of the table.
#include "flashtrain/common/shared_memory.cuh"
#include "flashtrain/layer_norm/layer_norm_backward_kernel.cuh"
#include "flashtrain/layer_norm/layer_norm_forward_kernel.cuh"

namespace flashtrain {
namespace {

using A = FLASHTRAIN_A;  // x0, dz
using B = FLASHTRAIN_B;  // residual, x, dx, dresidual

template <auto kKernel>
int LaunchForward(const LayerNormForwardParams& p, const LayerNormLaunch& launch, void* stream) {
  const dim3 cta(32 * launch.warps, launch.groups);
  kKernel<<<launch.ctas, cta, 0, static_cast<cudaStream_t>(stream)>>>(p, launch);
  return cudaGetLastError();
}

template <auto kKernel>
int LaunchBackward(const LayerNormBackwardParams& p, const LayerNormLaunch& launch, void* stream) {
  const cudaError_t error = AllowSharedMemory<kKernel>(launch.shared_bytes);
  if (error != cudaSuccess) return error;
  const int threads = 32 * launch.warps * launch.groups;
  kKernel<<<launch.ctas, threads, launch.shared_bytes, static_cast<cudaStream_t>(stream)>>>(p,
                                                                                            launch);
  return cudaGetLastError();
}

template <bool kLean>
int Forward(const LayerNormForwardParams& p, const LayerNormLaunch& launch, void* stream) {
  switch (launch.vecs) {
    case 2:
      return LaunchForward<layer_norm_forward_kernel<A, B, 2, kLean>>(p, launch, stream);
    case 3:
      return LaunchForward<layer_norm_forward_kernel<A, B, 3, kLean>>(p, launch, stream);
    case 4:
      return LaunchForward<layer_norm_forward_kernel<A, B, 4, kLean>>(p, launch, stream);
    default:
      return cudaErrorInvalidConfiguration;
  }
}

template <bool kLean>
int Backward(const LayerNormBackwardParams& p, const LayerNormLaunch& launch, void* stream) {
  switch (launch.vecs) {
    case 1:
      return LaunchBackward<layer_norm_backward_kernel<A, B, 1, kLean>>(p, launch, stream);
    case 2:
      return LaunchBackward<layer_norm_backward_kernel<A, B, 2, kLean>>(p, launch, stream);
    case 4:
      return LaunchBackward<layer_norm_backward_kernel<A, B, 4, kLean>>(p, launch, stream);
    default:
      return cudaErrorInvalidConfiguration;
  }
}

int ForwardAny(const LayerNormForwardParams& p, const LayerNormLaunch& launch, void* stream) {
  return launch.lean ? Forward<true>(p, launch, stream) : Forward<false>(p, launch, stream);
}

int BackwardAny(const LayerNormBackwardParams& p, const LayerNormLaunch& launch, void* stream) {
  return launch.lean ? Backward<true>(p, launch, stream) : Backward<false>(p, launch, stream);
}

}  // namespace

const LayerNormCudaKernels FLASHTRAIN_TABLE = {VecElements<A, B>(), ForwardAny, BackwardAny};

}  // namespace flashtrain
