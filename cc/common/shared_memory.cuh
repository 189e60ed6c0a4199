// Launches that need more shared memory than a kernel may use unasked.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

namespace flashtrain {

// Allows a kernel `bytes` of dynamic shared memory on the current device. More than 48 KiB, static
// arrays included, has to be allowed; the driver is asked once for each kernel and device.
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

}  // namespace flashtrain
