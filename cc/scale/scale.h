// y = factor * x, with a factor that lies on the device, and y of any dtype, on CPU and CUDA.
//
// For gradients that were computed before the gradient of the loss was known. Numerics: the product
// is fp32, rounded once to y's dtype. Cost: memory bound; x is read once and y written once.
//
//   ScaleParams p;
//   p.count = count, p.factor = factor;
//   p.x = x, p.x_dtype = DType::kFloat32, p.y = y, p.y_dtype = DType::kBFloat16;
//   Status s = Scale(p, Device::Cuda(), stream);
#pragma once

#include <cstdint>

#include "flashtrain/common/device.h"
#include "flashtrain/common/dtype.h"
#include "flashtrain/common/status.h"

namespace flashtrain {

// Pointers are memory of the op's device and must not be null unless count is 0.
struct ScaleParams {
  int64_t count = 0;              // >= 0, elements of x and y
  const float* factor = nullptr;  // [1]
  const void* x = nullptr;        // [count], x_dtype
  DType x_dtype = DType::kFloat32;
  void* y = nullptr;  // [count], y_dtype; x itself is allowed where the dtypes are the same
  DType y_dtype = DType::kFloat32;
};

// `stream` is a cudaStream_t (null: the default stream) and is ignored on CPU. CUDA work is only
// enqueued. Returns an error, and has written nothing, if the arguments are not as described above.
Status Scale(const ScaleParams& params, Device device, void* stream);

}  // namespace flashtrain
