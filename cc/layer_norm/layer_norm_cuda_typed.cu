// The vectorised kernels of one dtype pair, compiled once per pair:
// FLASHTRAIN_A and FLASHTRAIN_B are the C++ types, FLASHTRAIN_PAIR the name of the table.
#include <atomic>

#include "flashtrain/layer_norm/layer_norm_backward_kernel.cuh"
#include "flashtrain/layer_norm/layer_norm_forward_kernel.cuh"

namespace flashtrain {
namespace {

using A = FLASHTRAIN_A;  // x0, dz
using B = FLASHTRAIN_B;  // residual, x, dx, dresidual

// More than 48 KiB of shared memory, static arrays included, has to be allowed, once per kernel and
// device.
template <auto kKernel>
cudaError_t AllowSharedMemory(int bytes) {
  constexpr int kDefaultBytes = 44 * 1024, kMaxDevices = 64;
  if (bytes <= kDefaultBytes) return cudaSuccess;
  static std::atomic<int> allowed[kMaxDevices];
  int device = 0;
  if (cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (device < kMaxDevices && allowed[device].load() >= bytes) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && device < kMaxDevices) allowed[device].store(bytes);
  return error;
}

template <auto kKernel>
int LaunchForward(const LayerNormForwardParams& p, const LayerNormTile& tile, void* stream) {
  const dim3 cta(32 * tile.warps, tile.groups);
  kKernel<<<tile.ctas, cta, 0, static_cast<cudaStream_t>(stream)>>>(p, tile);
  return cudaGetLastError();
}

template <auto kKernel>
int LaunchBackward(const LayerNormBackwardParams& p, const LayerNormTile& tile, void* stream) {
  const cudaError_t error = AllowSharedMemory<kKernel>(tile.shared_bytes);
  if (error != cudaSuccess) return error;
  const int threads = 32 * tile.warps * tile.groups;
  kKernel<<<tile.ctas, threads, tile.shared_bytes, static_cast<cudaStream_t>(stream)>>>(p, tile);
  return cudaGetLastError();
}

template <bool kLean>
int Forward(const LayerNormForwardParams& p, const LayerNormTile& tile, void* stream) {
  switch (tile.vecs) {
    case 2:
      return LaunchForward<layer_norm_forward_kernel<A, B, 2, kLean>>(p, tile, stream);
    case 3:
      return LaunchForward<layer_norm_forward_kernel<A, B, 3, kLean>>(p, tile, stream);
    case 4:
      return LaunchForward<layer_norm_forward_kernel<A, B, 4, kLean>>(p, tile, stream);
    default:
      return cudaErrorInvalidConfiguration;
  }
}

template <bool kLean>
int Backward(const LayerNormBackwardParams& p, const LayerNormTile& tile, void* stream) {
  switch (tile.vecs) {
    case 1:
      return LaunchBackward<layer_norm_backward_kernel<A, B, 1, kLean>>(p, tile, stream);
    case 2:
      return LaunchBackward<layer_norm_backward_kernel<A, B, 2, kLean>>(p, tile, stream);
    case 4:
      return LaunchBackward<layer_norm_backward_kernel<A, B, 4, kLean>>(p, tile, stream);
    default:
      return cudaErrorInvalidConfiguration;
  }
}

int ForwardAny(const LayerNormForwardParams& p, const LayerNormTile& tile, void* stream) {
  return tile.lean ? Forward<true>(p, tile, stream) : Forward<false>(p, tile, stream);
}

int BackwardAny(const LayerNormBackwardParams& p, const LayerNormTile& tile, void* stream) {
  return tile.lean ? Backward<true>(p, tile, stream) : Backward<false>(p, tile, stream);
}

}  // namespace

const LayerNormCudaKernels FLASHTRAIN_PAIR = {VecElements<A, B>(), ForwardAny, BackwardAny};

}  // namespace flashtrain
