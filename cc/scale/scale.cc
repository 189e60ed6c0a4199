// Checks, and the CPU path: plain loops, which memory bounds on any instruction set.
#include "flashtrain/scale/scale.h"

#include <algorithm>
#include <string>

#include "flashtrain/common/check.h"
#include "flashtrain/common/cpu_row.h"
#include "flashtrain/common/parallel.h"
#include "flashtrain/scale/scale_cuda.h"

namespace flashtrain {
namespace {

Status Validate(const ScaleParams& p) {
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.count, 0, "count"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckElements({p.count}, "count"));
  for (const bool is_x : {true, false}) {
    FLASHTRAIN_RETURN_IF_ERROR(CheckDType(is_x ? p.x_dtype : p.y_dtype,
                                          {DType::kFloat32, DType::kFloat16, DType::kBFloat16},
                                          is_x ? "x_dtype" : "y_dtype"));
  }
  if (p.count == 0) return Status();
  FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.factor, "factor", "when count > 0"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.x, "x", "when count > 0"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.y, "y", "when count > 0"));
  if (p.x == p.y && p.x_dtype != p.y_dtype) {
    return Status::InvalidArgument(std::string("y_dtype is ") + DTypeName(p.y_dtype) +
                                   "; in place it must be x_dtype = " + DTypeName(p.x_dtype));
  }
  return Status();
}

void ScaleCpu(const ScaleParams& p) {
  constexpr int64_t kBlock = 1024, kTask = 16 * kBlock;
  ParallelFor((p.count + kTask - 1) / kTask, [&](int64_t task) {
    const int64_t end = std::min(p.count, (task + 1) * kTask);
    for (int64_t begin = task * kTask; begin < end; begin += kBlock) {
      const int64_t n = std::min(kBlock, end - begin);
      float buffer[kBlock], product[kBlock];
      const float* x = LoadFloat(p.x, p.x_dtype, begin, n, buffer);
      for (int64_t i = 0; i < n; ++i) product[i] = x[i] * *p.factor;
      StoreFloat(product, n, p.y, p.y_dtype, begin);
    }
  });
}

}  // namespace

Status Scale(const ScaleParams& params, Device device, void* stream) {
  const Status valid = Validate(params);
  if (!valid.ok()) return Status::InvalidArgument("Scale: " + valid.message());
  if (device.type == DeviceType::kCuda) return ScaleCuda(params, stream);
  ScaleCpu(params);
  return Status();
}

}  // namespace flashtrain
