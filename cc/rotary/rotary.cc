#include "flashtrain/rotary/rotary.h"

#include <string>

#include "flashtrain/common/check.h"
#include "flashtrain/rotary/rotary_cpu.h"
#include "flashtrain/rotary/rotary_cuda.h"

namespace flashtrain {
namespace {

std::string Str(int64_t value) { return std::to_string(value); }

Status ValidatePart(const RotaryParams& p, int index) {
  const RotaryPart& part = p.parts[index];
  const std::string name = "parts[" + Str(index) + "].";
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(part.heads, 0, name + "heads"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckElements({p.batch, p.seqlen, part.heads, p.head_dim},
                                           "batch, seqlen, " + name + "heads, head_dim"));
  if (part.heads == 0 || p.batch == 0 || p.seqlen == 0) return Status();
  FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(part.x, name + "x", "when there are elements"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(part.out, name + "out", "when there are elements"));
  if ((part.cos == nullptr) != (part.sin == nullptr)) {
    return Status::InvalidArgument(name + "cos and sin: one is null; give both or neither");
  }
  const bool same_strides = part.x_batch_stride == part.out_batch_stride &&
                            part.x_seq_stride == part.out_seq_stride &&
                            part.x_head_stride == part.out_head_stride;
  if (part.x == part.out && !same_strides) {
    return Status::InvalidArgument(name + "out is x, with other strides; give the same strides");
  }
  return Status();
}

Status ValidatePositions(const RotaryParams& p) {
  if (p.seqlen_offset < -kMaxElements || p.seqlen_offset > kMaxElements) {
    return Status::InvalidArgument("seqlen_offset is " + Str(p.seqlen_offset) +
                                   "; the tables hold positions 0 to " + Str(p.table_len - 1));
  }
  if (p.position_ids != nullptr) {
    FLASHTRAIN_RETURN_IF_ERROR(CheckNull(p.cu_seqlens, "cu_seqlens", "with position_ids"));
    FLASHTRAIN_RETURN_IF_ERROR(CheckNull(p.seqlen_offsets, "seqlen_offsets", "with position_ids"));
    if (p.seqlen_offset == 0) return Status();
    return Status::InvalidArgument("seqlen_offset is " + Str(p.seqlen_offset) +
                                   "; it must be 0 with position_ids");
  }
  if (p.cu_seqlens != nullptr) {
    FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.num_sequences, 0, "num_sequences"));
    if (p.batch == 1) return Status();
    return Status::InvalidArgument("batch is " + Str(p.batch) + "; it must be 1 with cu_seqlens");
  }
  if (p.seqlen_offsets != nullptr) return Status();
  if (p.seqlen_offset >= 0 && p.seqlen_offset <= p.table_len - p.seqlen) return Status();
  return Status::InvalidArgument("seqlen_offset: positions " + Str(p.seqlen_offset) + " to " +
                                 Str(p.seqlen_offset + p.seqlen - 1) +
                                 "; the tables hold positions 0 to " + Str(p.table_len - 1));
}

Status Validate(const RotaryParams& p) {
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.batch, 0, "batch"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.seqlen, 0, "seqlen"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.head_dim, 1, "head_dim"));
  if (p.rotary_dim < 2 || p.rotary_dim > p.head_dim || p.rotary_dim % 2 != 0) {
    return Status::InvalidArgument(
        "rotary_dim is " + Str(p.rotary_dim) +
        "; it must be even, and from 2 to head_dim = " + Str(p.head_dim));
  }
  if (p.num_parts < 1 || p.num_parts > RotaryParams::kMaxParts) {
    return Status::InvalidArgument("num_parts is " + Str(p.num_parts) + "; it must be from 1 to " +
                                   Str(RotaryParams::kMaxParts));
  }
  FLASHTRAIN_RETURN_IF_ERROR(
      CheckDType(p.dtype, {DType::kFloat32, DType::kFloat16, DType::kBFloat16}, "dtype"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckDType(p.table_dtype, {DType::kFloat32, p.dtype}, "table_dtype"));
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.table_len, 0, "table_len"));
  FLASHTRAIN_RETURN_IF_ERROR(
      CheckElements({p.table_len, p.rotary_dim / 2}, "table_len, rotary_dim / 2"));
  if (p.table_len > 1) {
    FLASHTRAIN_RETURN_IF_ERROR(
        CheckAtLeast(p.table_row_stride, p.rotary_dim / 2, "table_row_stride"));
  }
  for (int i = 0; i < p.num_parts; ++i) FLASHTRAIN_RETURN_IF_ERROR(ValidatePart(p, i));
  if (p.batch == 0 || p.seqlen == 0) return Status();
  return ValidatePositions(p);
}

}  // namespace

Status Rotary(const RotaryParams& params, Device device, void* stream) {
  FLASHTRAIN_RETURN_IF_ERROR(Validate(params).In("Rotary"));
  int64_t heads = 0;
  for (int i = 0; i < params.num_parts; ++i) heads += params.parts[i].heads;
  if (params.batch == 0 || params.seqlen == 0 || heads == 0) return Status();
  return (device.type == DeviceType::kCuda ? RotaryCuda(params, stream) : RotaryCpu(params))
      .In("Rotary");
}

}  // namespace flashtrain
