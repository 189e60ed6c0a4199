#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

#include "flashtrain/common/test_memory.h"

namespace flashtrain::testing {
namespace {

void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

}  // namespace

Device TestDevice() {
  int count = 0;
  Check(cudaGetDeviceCount(&count), "this test needs a CUDA device");
  return Device::Cuda();
}

void* Allocate(int64_t bytes) {
  void* ptr = nullptr;
  Check(cudaMalloc(&ptr, bytes), "cudaMalloc");
  return ptr;
}

void Free(void* ptr) { Check(cudaFree(ptr), "cudaFree"); }

void CopyToDevice(void* device, const void* host, int64_t bytes) {
  Check(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice), "copy to the device");
}

void CopyToHost(void* host, const void* device, int64_t bytes) {
  Check(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost), "copy to the host");
}

void Synchronize() { Check(cudaDeviceSynchronize(), "device"); }

}  // namespace flashtrain::testing
