#include "flashtrain/layer_norm/layer_norm.h"

#include <string>

#include "flashtrain/common/check.h"
#include "flashtrain/layer_norm/layer_norm_cpu.h"
#include "flashtrain/layer_norm/layer_norm_cuda.h"

namespace flashtrain {
namespace {

constexpr int64_t kMaxCols = int64_t{1} << 32;

Status CheckAnyDType(DType dtype, const std::string& name) {
  return CheckDType(dtype, {DType::kFloat32, DType::kFloat16, DType::kBFloat16}, name);
}

// What forward and backward have in common.
template <typename Params>
Status ValidateShared(const Params& p) {
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.rows, 0, "rows"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.cols, 1, "cols"));
  if (p.cols > kMaxCols) {
    return Status::InvalidArgument("cols is " + std::to_string(p.cols) +
                                   "; the largest supported is " + std::to_string(kMaxCols));
  }
  FLASHTRAIN_RETURN_IF_ERROR(CheckAnyDType(p.x0_dtype, "x0_dtype"));
  FLASHTRAIN_RETURN_IF_ERROR(
      CheckDType(p.x_dtype, {p.x0_dtype, DType::kFloat32}, "x_dtype (of residual and x)"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckAnyDType(p.z_dtype, "z_dtype"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckAnyDType(p.weight_dtype, "weight_dtype"));
  if (p.rowscale != nullptr) {
    FLASHTRAIN_RETURN_IF_ERROR(CheckAnyDType(p.rowscale_dtype, "rowscale_dtype"));
  }
  if (!(p.dropout_p >= 0.0f && p.dropout_p < 1.0f)) {
    return Status::InvalidArgument("dropout_p is " + std::to_string(p.dropout_p) +
                                   "; it must be in [0, 1)");
  }
  if (p.dropout_p > 0.0f) {
    FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.rng_state, "rng_state", "when dropout_p > 0"));
  }
  if (p.is_rms_norm) {
    FLASHTRAIN_RETURN_IF_ERROR(CheckNull(p.mean, "mean", "for RMSNorm, which has none"));
  }
  if (p.zero_centered_weight) {
    FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.weight, "weight", "with zero_centered_weight"));
  }
  return Status();
}

Status Validate(const LayerNormForwardParams& p) {
  FLASHTRAIN_RETURN_IF_ERROR(ValidateShared(p));
  if (!(p.epsilon >= 0.0f)) {
    return Status::InvalidArgument("epsilon is " + std::to_string(p.epsilon) +
                                   "; it must be at least 0");
  }
  if (p.rows == 0) return Status();
  FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.x0, "x0", "when rows > 0"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.z, "z", "when rows > 0"));
  FLASHTRAIN_RETURN_IF_ERROR(
      CheckRowStride(p.x0, p.rows, p.cols, p.x0_row_stride, "x0_row_stride"));
  FLASHTRAIN_RETURN_IF_ERROR(
      CheckRowStride(p.residual, p.rows, p.cols, p.residual_row_stride, "residual_row_stride"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckRowStride(p.z, p.rows, p.cols, p.z_row_stride, "z_row_stride"));
  return CheckRowStride(p.x, p.rows, p.cols, p.x_row_stride, "x_row_stride");
}

// All but the workspace, whose size depends on the rest.
Status ValidateBackward(const LayerNormBackwardParams& p) {
  FLASHTRAIN_RETURN_IF_ERROR(ValidateShared(p));
  if (p.dweight != nullptr) {
    FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.weight, "weight", "for dweight"));
  }
  if (p.dlayerscale != nullptr) {
    FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.layerscale, "layerscale", "for dlayerscale"));
  }
  if (p.rows == 0) return Status();
  if (p.dlayerscale != nullptr) {
    FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.x0, "x0", "for dlayerscale"));
  }
  FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.dz, "dz", "when rows > 0"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.x, "x", "when rows > 0"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.rstd, "rstd", "when rows > 0"));
  if (!p.is_rms_norm) {
    FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.mean, "mean", "for LayerNorm"));
  }
  FLASHTRAIN_RETURN_IF_ERROR(
      CheckRowStride(p.dz, p.rows, p.cols, p.dz_row_stride, "dz_row_stride"));
  FLASHTRAIN_RETURN_IF_ERROR(
      CheckRowStride(p.dx, p.rows, p.cols, p.dx_row_stride, "dx_row_stride"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckRowStride(p.x, p.rows, p.cols, p.x_row_stride, "x_row_stride"));
  FLASHTRAIN_RETURN_IF_ERROR(
      CheckRowStride(p.x0, p.rows, p.cols, p.x0_row_stride, "x0_row_stride"));
  FLASHTRAIN_RETURN_IF_ERROR(
      CheckRowStride(p.dx0, p.rows, p.cols, p.dx0_row_stride, "dx0_row_stride"));
  return CheckRowStride(p.dresidual, p.rows, p.cols, p.dresidual_row_stride,
                        "dresidual_row_stride");
}

Status ValidateWorkspace(const LayerNormBackwardParams& p, int64_t needed) {
  if (p.workspace_bytes < needed) {
    return Status::InvalidArgument("workspace_bytes is " + std::to_string(p.workspace_bytes) +
                                   "; LayerNormBackwardWorkspaceBytes asks for " +
                                   std::to_string(needed));
  }
  if (needed == 0) return Status();
  FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.workspace, "workspace", "for these gradients"));
  if (reinterpret_cast<uintptr_t>(p.workspace) % 16 != 0) {
    return Status::InvalidArgument("workspace is not aligned to 16 bytes");
  }
  return Status();
}

}  // namespace

Status LayerNormForward(const LayerNormForwardParams& params, Device device, void* stream) {
  FLASHTRAIN_RETURN_IF_ERROR(Validate(params).In("LayerNormForward"));
  if (device.type == DeviceType::kCuda) return LayerNormForwardCuda(params, stream);
  LayerNormForwardCpu(params);
  return Status();
}

Status LayerNormBackward(const LayerNormBackwardParams& params, Device device, void* stream) {
  FLASHTRAIN_RETURN_IF_ERROR(ValidateBackward(params).In("LayerNormBackward"));
  const int64_t needed = LayerNormBackwardWorkspaceBytes(params, device);
  FLASHTRAIN_RETURN_IF_ERROR(ValidateWorkspace(params, needed).In("LayerNormBackward"));
  if (device.type == DeviceType::kCuda) return LayerNormBackwardCuda(params, stream);
  LayerNormBackwardCpu(params);
  return Status();
}

int64_t LayerNormBackwardWorkspaceBytes(const LayerNormBackwardParams& params, Device device) {
  if (!ValidateShared(params).ok()) return -1;
  return device.type == DeviceType::kCuda ? LayerNormBackwardWorkspaceBytesCuda(params)
                                          : LayerNormBackwardWorkspaceBytesCpu(params);
}

}  // namespace flashtrain
