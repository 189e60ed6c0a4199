// Memory of the device under test, so that one test drives an op on CPU and on CUDA: link
// :test_memory_cpu or :test_memory_cuda.
#pragma once

#include <cstdint>

#include "flashtrain/common/device.h"

namespace flashtrain::testing {

// The device under test. For CUDA, exits with an error if there is none: such a test must not pass
// by running nothing.
Device TestDevice();

void* Allocate(int64_t bytes);
void Free(void* ptr);
void CopyToDevice(void* device, const void* host, int64_t bytes);
void CopyToHost(void* host, const void* device, int64_t bytes);

// Waits for the device and fails the process if it reports an error.
void Synchronize();

}  // namespace flashtrain::testing
