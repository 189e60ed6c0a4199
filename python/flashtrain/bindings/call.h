#pragma once

// What surrounds every call of an op: a workspace from the caller's allocator, the GIL released,
// the device guarded, a Status raised as an exception.

#include <pybind11/pybind11.h>

#include <cstdint>

#include "flashtrain/common/device.h"
#include "flashtrain/common/status.h"
#include "python/flashtrain/bindings/tensor_arg.h"

namespace flashtrain::bindings {

// An integer argument: without conversion, which would cut off what a NumPy or tensor number has
// after the point.
inline pybind11::arg Integer(const char* name) { return pybind11::arg(name).noconvert(); }

// Makes the argument's CUDA device current for its lifetime; does nothing for a CPU tensor.
// Throws std::runtime_error if CUDA refuses (no driver, no such device).
class DeviceGuard {
 public:
  explicit DeviceGuard(const TensorArg& arg);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;  // -1: nothing to restore
};

// kInvalidArgument becomes ValueError, all else RuntimeError.
void ThrowIfError(const Status& status);

// Runs `function(Device) -> Status` on the device of `arg`, without the GIL.
template <typename Function>
void Call(const TensorArg& arg, Function function) {
  Status status;
  {
    pybind11::gil_scoped_release release;
    DeviceGuard guard(arg);
    status = function(arg.device());
  }
  ThrowIfError(status);
}

// Returns `allocate(bytes)`, a uint8 tensor on the device of `arg`, and puts its address in *data.
// Returns None and leaves *data alone if bytes is not positive. The caller keeps the result alive
// until the op is enqueued; the allocator must order reuse of the memory after the op's stream.
pybind11::object AllocateWorkspace(const TensorArg& arg, const pybind11::function& allocate,
                                   int64_t bytes, void** data);

}  // namespace flashtrain::bindings
