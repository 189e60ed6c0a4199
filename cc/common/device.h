// Device: where an op's tensors live and its code runs.
#pragma once

#include <cstdint>

namespace flashtrain {

enum class DeviceType : int8_t { kCpu, kCuda };

// For kCuda the op runs on the calling thread's current device (cudaSetDevice), which must be the
// one that holds the tensors.
struct Device {
  DeviceType type = DeviceType::kCpu;

  static constexpr Device Cpu() { return {DeviceType::kCpu}; }
  static constexpr Device Cuda() { return {DeviceType::kCuda}; }
};

}  // namespace flashtrain
