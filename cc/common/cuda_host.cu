#include <cuda_runtime.h>

#include <atomic>
#include <mutex>
#include <string>
#include <utility>

#include "flashtrain/common/cuda_host.h"

namespace flashtrain {

Status FromCuda(int error, const char* op, const char* what) {
  if (error == cudaSuccess) return Status();
  const std::string message = std::string(op) + ": " + what +
                              " failed: " + cudaGetErrorString(static_cast<cudaError_t>(error));
  const bool no_device = error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver;
  return no_device ? Status::Unavailable(message) : Status::Internal(message);
}

Status GetDeviceLimits(const char* op, DeviceLimits* limits) {
  constexpr int kMaxDevices = 64;
  static DeviceLimits cache[kMaxDevices];
  static std::atomic<bool> known[kMaxDevices];
  static std::mutex mutex;
  int device = 0;
  FLASHTRAIN_RETURN_IF_ERROR(FromCuda(cudaGetDevice(&device), op, "cudaGetDevice"));
  if (device < kMaxDevices && known[device].load(std::memory_order_acquire)) {
    *limits = cache[device];
    return Status();
  }
  const std::pair<cudaDeviceAttr, int*> wanted[] = {
      {cudaDevAttrMultiProcessorCount, &limits->multiprocessors},
      {cudaDevAttrComputeCapabilityMajor, &limits->compute_capability_major},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &limits->shared_per_cta},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &limits->shared_per_multiprocessor}};
  for (const auto& [attribute, value] : wanted) {
    FLASHTRAIN_RETURN_IF_ERROR(
        FromCuda(cudaDeviceGetAttribute(value, attribute, device), op, "cudaDeviceGetAttribute"));
  }
  if (device >= kMaxDevices) return Status();
  std::lock_guard<std::mutex> lock(mutex);
  cache[device] = *limits;
  known[device].store(true, std::memory_order_release);
  return Status();
}

}  // namespace flashtrain
