#include "flashtrain/attention/attention.h"

#include <string>

#include "flashtrain/attention/attention_cpu.h"
#include "flashtrain/common/check.h"

namespace flashtrain {
namespace {

// cu_seqlens_q and what belongs to it, or cu_seqlens_k.
Status CheckSequences(const int32_t* cu_seqlens, int64_t batch, int64_t max_seqlen, int64_t total,
                      const std::string& side) {
  const std::string name = "cu_seqlens_" + side;
  if (cu_seqlens[0] != 0) {
    return Status::InvalidArgument(name + "[0] is " + std::to_string(cu_seqlens[0]) +
                                   "; it must be 0");
  }
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = int64_t{cu_seqlens[b + 1]} - cu_seqlens[b];
    if (length < 0 || length > max_seqlen) {
      return Status::InvalidArgument(name + " gives sequence " + std::to_string(b) +
                                     " a length of " + std::to_string(length) +
                                     "; it must be in [0, max_seqlen_" + side + "], here [0, " +
                                     std::to_string(max_seqlen) + "]");
    }
  }
  if (cu_seqlens[batch] != total) {
    return Status::InvalidArgument(name + " ends with " + std::to_string(cu_seqlens[batch]) +
                                   "; it must end with the number of rows, " +
                                   std::to_string(total));
  }
  return Status();
}

Status CheckSizes(const AttentionParams& p) {
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.batch, 0, "batch"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.max_seqlen_q, 0, "max_seqlen_q"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.max_seqlen_k, 0, "max_seqlen_k"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.num_heads, 1, "num_heads"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.num_heads_k, 1, "num_heads_k"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.head_dim, 1, "head_dim"));
  if (p.num_heads % p.num_heads_k != 0) {
    return Status::InvalidArgument(
        "num_heads is " + std::to_string(p.num_heads) +
        "; it must be a multiple of num_heads_k = " + std::to_string(p.num_heads_k));
  }
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.window_left, -1, "window_left"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.window_right, -1, "window_right"));
  return CheckDType(p.dtype, {DType::kFloat32, DType::kFloat16, DType::kBFloat16}, "dtype");
}

Status CheckNumbers(const AttentionParams& p) {
  if (!(p.softmax_scale > 0.0f)) {
    return Status::InvalidArgument("softmax_scale is " + std::to_string(p.softmax_scale) +
                                   "; it must be greater than 0");
  }
  if (!(p.softcap >= 0.0f)) {
    return Status::InvalidArgument("softcap is " + std::to_string(p.softcap) +
                                   "; it must be at least 0 (0: no softcap)");
  }
  if (!(p.dropout_p >= 0.0f && p.dropout_p < 1.0f)) {
    return Status::InvalidArgument("dropout_p is " + std::to_string(p.dropout_p) +
                                   "; it must be in [0, 1)");
  }
  if (p.dropout_p > 0.0f) {
    FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.rng_state, "rng_state", "when dropout_p > 0"));
  }
  return Status();
}

Status Validate(const AttentionParams& p) {
  FLASHTRAIN_RETURN_IF_ERROR(CheckSizes(p));
  FLASHTRAIN_RETURN_IF_ERROR(CheckNumbers(p));
  if ((p.cu_seqlens_q == nullptr) != (p.cu_seqlens_k == nullptr)) {
    return Status::InvalidArgument(
        "cu_seqlens_q and cu_seqlens_k: one is null; both or none must be given");
  }
  if (p.cu_seqlens_q != nullptr) {
    FLASHTRAIN_RETURN_IF_ERROR(
        CheckSequences(p.cu_seqlens_q, p.batch, p.max_seqlen_q, p.total_q, "q"));
    FLASHTRAIN_RETURN_IF_ERROR(
        CheckSequences(p.cu_seqlens_k, p.batch, p.max_seqlen_k, p.total_k, "k"));
  }
  if (p.batch * p.max_seqlen_q > 0) {
    FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.q.data, "q", "when there are queries"));
    FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.out.data, "out", "when there are queries"));
    FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.lse, "lse", "when there are queries"));
  }
  if (p.batch * p.max_seqlen_k > 0) {
    FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.k.data, "k", "when there are keys"));
    FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.v.data, "v", "when there are keys"));
  }
  return Status();
}

Status ValidateGradients(const AttentionBackwardParams& p) {
  if (p.batch * p.max_seqlen_q > 0) {
    FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.dout.data, "dout", "when there are queries"));
    FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.dq.data, "dq", "when there are queries"));
  }
  if (p.batch * p.max_seqlen_k > 0) {
    FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.dk.data, "dk", "when there are keys"));
    FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.dv.data, "dv", "when there are keys"));
  }
  return Status();
}

// Errors say which function refused.
Status Named(const char* function, const Status& status) {
  if (status.ok()) return status;
  return Status::InvalidArgument(std::string(function) + ": " + status.message());
}

}  // namespace

Status AttentionForward(const AttentionForwardParams& params) {
  FLASHTRAIN_RETURN_IF_ERROR(Named("AttentionForward", Validate(params)));
  AttentionForwardCpu(params);
  return Status();
}

Status AttentionBackward(const AttentionBackwardParams& params) {
  FLASHTRAIN_RETURN_IF_ERROR(Named("AttentionBackward", Validate(params)));
  FLASHTRAIN_RETURN_IF_ERROR(Named("AttentionBackward", ValidateGradients(params)));
  AttentionBackwardCpu(params);
  return Status();
}

}  // namespace flashtrain
