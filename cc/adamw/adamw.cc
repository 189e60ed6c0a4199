#include "flashtrain/adamw/adamw.h"

#include <cmath>
#include <string>

#include "flashtrain/adamw/adamw_cpu.h"
#include "flashtrain/adamw/adamw_cuda.h"
#include "flashtrain/common/check.h"

namespace flashtrain {
namespace {

Status CheckAnyDType(DType dtype, const std::string& name) {
  return CheckDType(dtype, {DType::kFloat32, DType::kFloat16, DType::kBFloat16}, name);
}

Status ValidateTensor(const AdamWTensor& t, int64_t num_groups, const std::string& name) {
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(t.numel, 0, name + "numel"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckAnyDType(t.param_dtype, name + "param_dtype"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckAnyDType(t.grad_dtype, name + "grad_dtype"));
  if (t.group < 0 || t.group >= num_groups) {
    return Status::InvalidArgument(name + "group is " + std::to_string(t.group) +
                                   "; it must be from 0 to " + std::to_string(num_groups - 1));
  }
  FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(t.step, name + "step", "for every tensor"));
  if (t.param_dtype == DType::kFloat32) {
    FLASHTRAIN_RETURN_IF_ERROR(CheckNull(t.master, name + "master", "for float32 parameters"));
  }
  if (t.numel == 0) return Status();
  const std::string why = "where there are elements";
  FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(t.param, name + "param", why));
  FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(t.exp_avg, name + "exp_avg", why));
  return CheckNotNull(t.exp_avg_sq, name + "exp_avg_sq", why);
}

Status CheckRange(double value, double end, const char* range, const std::string& name) {
  if (value >= 0.0 && value < end) return Status();
  return Status::InvalidArgument(name + " is " + std::to_string(value) + "; it must be " + range);
}

Status ValidateGroup(const AdamWGroup& g, const std::string& name) {
  constexpr double kEnd = std::numeric_limits<float>::max();  // what the kernels compute with
  FLASHTRAIN_RETURN_IF_ERROR(CheckRange(g.beta1, 1.0, "in [0, 1)", name + "beta1"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckRange(g.beta2, 1.0, "in [0, 1)", name + "beta2"));
  FLASHTRAIN_RETURN_IF_ERROR(
      CheckRange(g.lr, kEnd, "at least 0 and finite in float32", name + "lr"));
  FLASHTRAIN_RETURN_IF_ERROR(
      CheckRange(g.eps, kEnd, "at least 0 and finite in float32", name + "eps"));
  return CheckRange(g.weight_decay, kEnd, "at least 0 and finite in float32",
                    name + "weight_decay");
}

Status Validate(const AdamWParams& p) {
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.num_tensors, 0, "num_tensors"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.num_groups, p.num_tensors > 0 ? 1 : 0, "num_groups"));
  for (int64_t i = 0; i < p.num_groups; ++i) {
    FLASHTRAIN_RETURN_IF_ERROR(ValidateGroup(p.groups[i], "groups[" + std::to_string(i) + "]."));
  }
  for (int64_t i = 0; i < p.num_tensors; ++i) {
    FLASHTRAIN_RETURN_IF_ERROR(
        ValidateTensor(p.tensors[i], p.num_groups, "tensors[" + std::to_string(i) + "]."));
  }
  if (!(p.max_norm > 0.0)) {
    return Status::InvalidArgument("max_norm is " + std::to_string(p.max_norm) +
                                   "; it must be greater than 0");
  }
  if (std::isfinite(p.max_norm)) {
    return CheckNotNull(p.grad_norm, "grad_norm", "to clip to max_norm");
  }
  return Status();
}

Status ValidateNorm(const GradNormParams& p) {
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.num_tensors, 0, "num_tensors"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.norm, "norm", "for the result"));
  for (int64_t i = 0; i < p.num_tensors; ++i) {
    const std::string name = "tensors[" + std::to_string(i) + "].";
    FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.tensors[i].numel, 0, name + "numel"));
    FLASHTRAIN_RETURN_IF_ERROR(CheckAnyDType(p.tensors[i].dtype, name + "dtype"));
    if (p.tensors[i].numel == 0) continue;
    FLASHTRAIN_RETURN_IF_ERROR(
        CheckNotNull(p.tensors[i].grad, name + "grad", "where there are elements"));
  }
  const int64_t needed = GradNormWorkspaceBytes(p);
  if (p.workspace_bytes < needed) {
    return Status::InvalidArgument("workspace_bytes is " + std::to_string(p.workspace_bytes) +
                                   "; GradNormWorkspaceBytes asks for " + std::to_string(needed));
  }
  return needed == 0 ? Status() : CheckNotNull(p.workspace, "workspace", "for these gradients");
}

}  // namespace

Status AdamWStep(const AdamWParams& params, Device device, void* stream) {
  FLASHTRAIN_RETURN_IF_ERROR(Validate(params).In("AdamWStep"));
  if (device.type == DeviceType::kCuda) return AdamWStepCuda(params, stream).In("AdamWStep");
  AdamWStepCpu(params);
  return Status();
}

Status GradNorm(const GradNormParams& params, Device device, void* stream) {
  FLASHTRAIN_RETURN_IF_ERROR(ValidateNorm(params).In("GradNorm"));
  if (device.type == DeviceType::kCuda) return GradNormCuda(params, stream).In("GradNorm");
  GradNormCpu(params);
  return Status();
}

int64_t GradNormWorkspaceBytes(const GradNormParams& params) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < params.num_tensors; ++i) {
    chunks += (params.tensors[i].numel + kGradNormChunk - 1) / kGradNormChunk;
  }
  return chunks * static_cast<int64_t>(sizeof(double));
}

}  // namespace flashtrain
