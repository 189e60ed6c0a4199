#include "flashtrain/cross_entropy/cross_entropy.h"

#include <string>

#include "flashtrain/common/check.h"
#include "flashtrain/cross_entropy/cross_entropy_cpu.h"
#include "flashtrain/cross_entropy/cross_entropy_cuda.h"

namespace flashtrain {
namespace {

constexpr int64_t kMaxCols = int64_t{1} << 32;

Status CheckOptions(const CrossEntropyParams& p) {
  if (!(p.label_smoothing >= 0.0f && p.label_smoothing <= 1.0f)) {
    return Status::InvalidArgument("label_smoothing is " + std::to_string(p.label_smoothing) +
                                   "; it must be in [0, 1]");
  }
  if (!(p.logit_scale > 0.0f && p.logit_scale <= 1e30f)) {
    return Status::InvalidArgument("logit_scale is " + std::to_string(p.logit_scale) +
                                   "; it must be positive and finite");
  }
  if (!(p.lse_square_scale >= 0.0f && p.lse_square_scale <= 1e30f)) {
    return Status::InvalidArgument("lse_square_scale is " + std::to_string(p.lse_square_scale) +
                                   "; it must be at least 0 and finite");
  }
  return Status();
}

Status ValidateShared(const CrossEntropyParams& p) {
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.rows, 0, "rows"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.cols, 1, "cols"));
  if (p.cols > kMaxCols) {
    return Status::InvalidArgument("cols is " + std::to_string(p.cols) +
                                   "; the largest supported is " + std::to_string(kMaxCols));
  }
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.num_classes, 1, "num_classes"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.first_class, 0, "first_class"));
  FLASHTRAIN_RETURN_IF_ERROR(
      CheckDType(p.dtype, {DType::kFloat32, DType::kFloat16, DType::kBFloat16}, "dtype"));
  if (p.label_type != LabelType::kInt64 && p.label_type != LabelType::kInt32) {
    return Status::InvalidArgument("label_type is " +
                                   std::to_string(static_cast<int>(p.label_type)) +
                                   "; supported: kInt64 (0), kInt32 (1)");
  }
  FLASHTRAIN_RETURN_IF_ERROR(CheckOptions(p));
  if (p.rows == 0) return Status();
  FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.logits, "logits", "when rows > 0"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.labels, "labels", "when rows > 0"));
  return CheckRowStride(p.logits, p.rows, p.cols, p.logits_row_stride, "logits_row_stride");
}

Status ValidateForward(const CrossEntropyParams& p) {
  FLASHTRAIN_RETURN_IF_ERROR(ValidateShared(p));
  if (p.known_lse != nullptr && p.label_smoothing > 0.0f) {
    return Status::InvalidArgument("label_smoothing is " + std::to_string(p.label_smoothing) +
                                   "; with known_lse it must be 0");
  }
  if (p.partial) {
    FLASHTRAIN_RETURN_IF_ERROR(CheckNull(p.z_losses, "z_losses", "for partial losses"));
  } else if (p.first_class != 0 || p.num_classes > p.cols) {
    return Status::InvalidArgument("first_class is " + std::to_string(p.first_class) +
                                   " and num_classes " + std::to_string(p.num_classes) +
                                   "; losses that are not partial need all classes here: 0 and at "
                                   "most cols = " +
                                   std::to_string(p.cols));
  }
  return p.rows == 0 ? Status() : CheckNotNull(p.losses, "losses", "when rows > 0");
}

Status ValidateGradient(const CrossEntropyParams& p) {
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.dlosses_stride, 0, "dlosses_stride"));
  if (p.rows == 0) return Status();
  FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.dlogits, "dlogits", "when rows > 0"));
  FLASHTRAIN_RETURN_IF_ERROR(
      CheckRowStride(p.dlogits, p.rows, p.cols, p.dlogits_row_stride, "dlogits_row_stride"));
  if (p.dlogits == p.logits && p.rows > 1 && p.dlogits_row_stride != p.logits_row_stride) {
    return Status::InvalidArgument(
        "dlogits_row_stride is " + std::to_string(p.dlogits_row_stride) +
        "; in place it must be logits_row_stride = " + std::to_string(p.logits_row_stride));
  }
  return Status();
}

Status ValidateBackward(const CrossEntropyParams& p) {
  FLASHTRAIN_RETURN_IF_ERROR(ValidateShared(p));
  if (p.rows > 0) {
    FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.known_lse, "known_lse", "for the gradient"));
    FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.dlosses, "dlosses", "for the gradient"));
  }
  return ValidateGradient(p);
}

Status ValidateForwardBackward(const CrossEntropyParams& p) {
  FLASHTRAIN_RETURN_IF_ERROR(ValidateForward(p));
  FLASHTRAIN_RETURN_IF_ERROR(CheckNull(p.known_lse, "known_lse", "in one pass with the gradient"));
  if (p.partial) {
    return Status::InvalidArgument(
        "partial is true; the gradient in one pass with the losses needs all classes here");
  }
  return ValidateGradient(p);
}

Status Run(const CrossEntropyParams& p, CrossEntropyPass pass, const char* function,
           const Status& valid, Device device, void* stream) {
  FLASHTRAIN_RETURN_IF_ERROR(valid.In(function));
  if (device.type == DeviceType::kCuda) return CrossEntropyCuda(p, pass, stream);
  return CrossEntropyCpu(p, pass).In(function);
}

}  // namespace

Status CrossEntropyForward(const CrossEntropyParams& params, Device device, void* stream) {
  return Run(params, CrossEntropyPass::kForward, "CrossEntropyForward", ValidateForward(params),
             device, stream);
}

Status CrossEntropyBackward(const CrossEntropyParams& params, Device device, void* stream) {
  return Run(params, CrossEntropyPass::kBackward, "CrossEntropyBackward", ValidateBackward(params),
             device, stream);
}

Status CrossEntropyForwardBackward(const CrossEntropyParams& params, Device device, void* stream) {
  return Run(params, CrossEntropyPass::kForwardBackward, "CrossEntropyForwardBackward",
             ValidateForwardBackward(params), device, stream);
}

}  // namespace flashtrain
