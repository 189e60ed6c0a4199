#include "flashtrain/fused_dense/fused_dense.h"

#include <string>

#include "flashtrain/common/check.h"
#include "flashtrain/fused_dense/fused_dense_cpu.h"
#include "flashtrain/fused_dense/fused_dense_cuda.h"

namespace flashtrain {
namespace {

template <typename Params>
Status ValidateShared(const Params& p) {
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.rows, 0, "rows"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.cols, 1, "cols"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckElements({p.rows, p.cols}, "rows, cols"));
  FLASHTRAIN_RETURN_IF_ERROR(
      CheckDType(p.dtype, {DType::kFloat32, DType::kFloat16, DType::kBFloat16}, "dtype"));
  if (p.activation < Activation::kIdentity || p.activation > Activation::kSquaredRelu) {
    return Status::InvalidArgument("activation is " +
                                   std::to_string(static_cast<int>(p.activation)) +
                                   "; supported: kIdentity, kGeluApprox, kRelu, kSquaredRelu");
  }
  return Status();
}

Status Validate(const DenseActivationForwardParams& p) {
  FLASHTRAIN_RETURN_IF_ERROR(ValidateShared(p));
  if (p.rows == 0) return Status();
  FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.x, "x", "when rows > 0"));
  if (p.pre_act == nullptr) {
    return CheckNotNull(p.out, "out", "where pre_act is null: there would be nothing to write");
  }
  if (p.pre_act == p.out) {
    return Status::InvalidArgument("pre_act and out are the same memory; they must not overlap");
  }
  return Status();
}

Status Validate(const DenseActivationBackwardParams& p) {
  FLASHTRAIN_RETURN_IF_ERROR(ValidateShared(p));
  if (p.rows == 0) return Status();
  FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.dout, "dout", "when rows > 0"));
  if (p.activation != Activation::kIdentity) {
    FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.pre_act, "pre_act", "with an activation"));
  }
  return Status();
}

Status ValidateWorkspace(const DenseActivationBackwardParams& p, int64_t needed) {
  if (p.workspace_bytes < needed) {
    return Status::InvalidArgument("workspace_bytes is " + std::to_string(p.workspace_bytes) +
                                   "; DenseActivationBackwardWorkspaceBytes asks for " +
                                   std::to_string(needed));
  }
  if (needed == 0) return Status();
  FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.workspace, "workspace", "for dbias"));
  if (reinterpret_cast<uintptr_t>(p.workspace) % 16 != 0) {
    return Status::InvalidArgument("workspace is not aligned to 16 bytes");
  }
  return Status();
}

}  // namespace

Status DenseActivationForward(const DenseActivationForwardParams& params, Device device,
                              void* stream) {
  FLASHTRAIN_RETURN_IF_ERROR(Validate(params).In("DenseActivationForward"));
  if (device.type == DeviceType::kCuda) return DenseActivationForwardCuda(params, stream);
  DenseActivationForwardCpu(params);
  return Status();
}

Status DenseActivationBackward(const DenseActivationBackwardParams& params, Device device,
                               void* stream) {
  FLASHTRAIN_RETURN_IF_ERROR(Validate(params).In("DenseActivationBackward"));
  const int64_t needed = DenseActivationBackwardWorkspaceBytes(params, device);
  FLASHTRAIN_RETURN_IF_ERROR(ValidateWorkspace(params, needed).In("DenseActivationBackward"));
  if (device.type == DeviceType::kCuda) return DenseActivationBackwardCuda(params, stream);
  DenseActivationBackwardCpu(params);
  return Status();
}

int64_t DenseActivationBackwardWorkspaceBytes(const DenseActivationBackwardParams& params,
                                              Device device) {
  if (!ValidateShared(params).ok()) return -1;
  return device.type == DeviceType::kCuda ? DenseActivationBackwardWorkspaceBytesCuda(params)
                                          : DenseActivationBackwardWorkspaceBytesCpu(params);
}

}  // namespace flashtrain
