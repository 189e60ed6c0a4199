#include "flashtrain/attention/attention.h"

#include <algorithm>
#include <limits>
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
  // With cu_seqlens max_seqlen is a bound, and the sequences have no more rows than the totals.
  const bool varlen = p.cu_seqlens_q != nullptr;
  FLASHTRAIN_RETURN_IF_ERROR(CheckElements(
      {varlen ? 1 : p.batch, varlen ? p.total_q : p.max_seqlen_q, p.num_heads, p.head_dim},
      "batch, queries, num_heads, head_dim"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckElements(
      {varlen ? 1 : p.batch, varlen ? p.total_k : p.max_seqlen_k, p.num_heads_k, p.head_dim},
      "batch, keys, num_heads_k, head_dim"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.window_left, -1, "window_left"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.window_right, -1, "window_right"));
  return CheckDType(p.dtype, {DType::kFloat32, DType::kFloat16, DType::kBFloat16}, "dtype");
}

Status CheckNumbers(const AttentionParams& p) {
  constexpr float kLargest = std::numeric_limits<float>::max();
  if (!(p.softmax_scale >= 0.0f && p.softmax_scale <= kLargest)) {
    return Status::InvalidArgument("softmax_scale is " + std::to_string(p.softmax_scale) +
                                   "; it must be finite and at least 0");
  }
  if (!(p.softcap >= 0.0f && p.softcap <= kLargest)) {
    return Status::InvalidArgument("softcap is " + std::to_string(p.softcap) +
                                   "; it must be finite and at least 0 (0: no softcap)");
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

bool HasRows(int64_t batch, int64_t max_seqlen, const int32_t* cu_seqlens, int64_t total) {
  return batch > 0 && (cu_seqlens == nullptr ? max_seqlen : total) > 0;
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
  if (HasRows(p.batch, p.max_seqlen_q, p.cu_seqlens_q, p.total_q)) {
    FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.q.data, "q", "when there are queries"));
    FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.out.data, "out", "when there are queries"));
    FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.lse, "lse", "when there are queries"));
  }
  if (HasRows(p.batch, p.max_seqlen_k, p.cu_seqlens_k, p.total_k)) {
    FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.k.data, "k", "when there are keys"));
    FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.v.data, "v", "when there are keys"));
  }
  return Status();
}

Status ValidateGradients(const AttentionBackwardParams& p) {
  if (HasRows(p.batch, p.max_seqlen_q, p.cu_seqlens_q, p.total_q)) {
    FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.dout.data, "dout", "when there are queries"));
    FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.dq.data, "dq", "when there are queries"));
  }
  if (HasRows(p.batch, p.max_seqlen_k, p.cu_seqlens_k, p.total_k)) {
    FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.dk.data, "dk", "when there are keys"));
    FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(p.dv.data, "dv", "when there are keys"));
  }
  return Status();
}

int64_t Longest(const int32_t* cu_seqlens, int64_t batch) {
  int64_t longest = 0;
  for (int64_t b = 0; b < batch; ++b) {
    longest = std::max(longest, int64_t{cu_seqlens[b + 1]} - cu_seqlens[b]);
  }
  return longest;
}

// The same problem with the lengths that there are for upper bounds, by which tasks and memory are
// counted, and no limit for a window that hides nothing.
template <typename Params>
Params Tightened(Params p) {
  if (p.cu_seqlens_q != nullptr) {
    p.max_seqlen_q = Longest(p.cu_seqlens_q, p.batch);
    p.max_seqlen_k = Longest(p.cu_seqlens_k, p.batch);
  }
  if (p.window_left >= p.max_seqlen_k) p.window_left = -1;
  if (p.window_right >= p.max_seqlen_q) p.window_right = -1;
  return p;
}

}  // namespace

Status AttentionForward(const AttentionForwardParams& params) {
  FLASHTRAIN_RETURN_IF_ERROR(Validate(params).In("AttentionForward"));
  AttentionForwardCpu(Tightened(params));
  return Status();
}

Status AttentionBackward(const AttentionBackwardParams& params) {
  FLASHTRAIN_RETURN_IF_ERROR(Validate(params).In("AttentionBackward"));
  FLASHTRAIN_RETURN_IF_ERROR(ValidateGradients(params).In("AttentionBackward"));
  AttentionBackwardCpu(Tightened(params));
  return Status();
}

}  // namespace flashtrain
