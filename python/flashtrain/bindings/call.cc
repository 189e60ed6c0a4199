#include "python/flashtrain/bindings/call.h"

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace flashtrain::bindings {
namespace {

namespace py = pybind11;

void ThrowIfCudaError(cudaError_t error, int device) {
  if (error == cudaSuccess) return;
  throw std::runtime_error("cannot use cuda:" + std::to_string(device) + ": " +
                           cudaGetErrorString(error));
}

}  // namespace

DeviceGuard::DeviceGuard(const TensorArg& arg) {
  if (!arg.is_cuda()) return;
  int current = -1;
  ThrowIfCudaError(cudaGetDevice(&current), arg.device_index());
  if (current == arg.device_index()) return;
  ThrowIfCudaError(cudaSetDevice(arg.device_index()), arg.device_index());
  previous_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

void ThrowIfError(const Status& status) {
  if (status.ok()) return;
  if (status.code() == StatusCode::kInvalidArgument) throw std::invalid_argument(status.message());
  throw std::runtime_error(status.message());
}

py::object AllocateWorkspace(const TensorArg& arg, const py::function& allocate, int64_t bytes,
                             void** data) {
  if (bytes <= 0) return py::none();
  py::object tensor = allocate(bytes);
  const TensorArg workspace("workspace", tensor);
  workspace.ExpectElementType(ElementType::kUInt8);
  workspace.ExpectSameDevice(arg);
  workspace.ExpectShape({bytes});
  workspace.ExpectContiguous();
  *data = workspace.data();
  return tensor;
}

}  // namespace flashtrain::bindings
