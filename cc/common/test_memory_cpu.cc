#include <cstdlib>
#include <cstring>

#include "flashtrain/common/test_memory.h"

namespace flashtrain::testing {

Device TestDevice() { return Device::Cpu(); }
void* Allocate(int64_t bytes) { return std::malloc(bytes); }
void Free(void* ptr) { std::free(ptr); }
void CopyToDevice(void* device, const void* host, int64_t bytes) {
  if (bytes > 0) std::memcpy(device, host, bytes);
}
void CopyToHost(void* host, const void* device, int64_t bytes) {
  if (bytes > 0) std::memcpy(host, device, bytes);
}
void Synchronize() {}

}  // namespace flashtrain::testing
