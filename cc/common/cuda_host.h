// What the host side of every CUDA kernel shares: errors, limits of the device, launch arithmetic.
//
//   DeviceLimits device;
//   FLASHTRAIN_RETURN_IF_ERROR(GetDeviceLimits("layer_norm", &device));
//   kernel<<<CeilDivide(rows, 4), 128, 0, stream>>>(params);
//   return FromCuda(cudaGetLastError(), "layer_norm", "forward launch");
#pragma once

#include <cstdint>

#include "flashtrain/common/status.h"

namespace flashtrain {

// "<op>: <what> failed: <CUDA's words>". `error` is a cudaError_t; without a device or a driver the
// status is Unavailable, else Internal.
Status FromCuda(int error, const char* op, const char* what);

struct DeviceLimits {
  int multiprocessors = 0, compute_capability_major = 0;
  int shared_per_cta = 0, shared_per_multiprocessor = 0;  // bytes
};

// Of the current device. The driver is asked once for each device.
Status GetDeviceLimits(const char* op, DeviceLimits* limits);

constexpr int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether an address is a multiple of `bytes`. Null is.
inline bool IsAlignedTo(const void* ptr, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(ptr) % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace flashtrain
