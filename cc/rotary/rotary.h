// Rotary position embedding of queries and keys, forward and backward, on CPU and CUDA.
//
// The first rotary_dim elements of each head are taken in pairs, and pair i is turned by the angle
// whose cosine and sine the tables hold at (position, i):
//
//   out_a = a * cos - b * sin
//   out_b = b * cos + a * sin
//
// Pair i is elements (i, i + rotary_dim / 2), as in GPT-NeoX, or (2i, 2i + 1) where interleaved, as
// in GPT-J. Source: Su et al. 2021 (arXiv:2104.09864), section 3.4.2. The other elements of a head
// are copied. The backward pass is the same with `conjugate`, which turns by the negative angle.
//
// One call, and one launch, does up to RotaryParams::kMaxParts parts: the queries, keys and values
// of a packed tensor.
//
// Positions. Token t of sequence b is at seqlen_offset + seqlen_offsets[b] + t, or at
// position_ids[b][t]. With cu_seqlens the tokens of all sequences lie one after the other, and
// those after the last sequence are copied.
//
// A position outside the tables: on the CPU an error, and nothing is written; on CUDA, where the
// host does not know positions that device memory holds, the rotated elements of that token become
// NaN. Nothing outside the tables is read.
//
// Numerics: fp32 arithmetic, one rounding to the dtype. NaN and inf stay in their pair. Bitwise
// deterministic.
//
// Cost: memory bound; each element is read and written once, in place only the rotated ones. Heads
// whose memory is not 16-byte aligned, or whose rotary_dim / 2 is not a multiple of the vector (8
// elements of 2 bytes, 4 of 4), go in narrower accesses.
#pragma once

#include <cstdint>

#include "flashtrain/common/device.h"
#include "flashtrain/common/dtype.h"
#include "flashtrain/common/status.h"

namespace flashtrain {

// One [batch, seqlen, heads, head_dim] tensor: queries, keys or values. Strides are in elements;
// the last dimension's is 1.
struct RotaryPart {
  const void* x = nullptr;  // dtype; null allowed where the part has no elements
  int64_t x_batch_stride = 0;
  int64_t x_seq_stride = 0;
  int64_t x_head_stride = 0;

  void* out = nullptr;  // dtype; equal to x with equal strides (in place), or no overlap
  int64_t out_batch_stride = 0;
  int64_t out_seq_stride = 0;
  int64_t out_head_stride = 0;

  int64_t heads = 0;  // >= 0

  // [table_len, rotary_dim / 2], table_dtype, adjacent columns; both null: the part is copied.
  const void* cos = nullptr;
  const void* sin = nullptr;
};

struct RotaryParams {
  static constexpr int kMaxParts = 3;

  int64_t batch = 0;       // >= 0; 1 with cu_seqlens
  int64_t seqlen = 0;      // >= 0; with cu_seqlens, of all sequences together
  int64_t head_dim = 0;    // >= 1
  int64_t rotary_dim = 0;  // even, in [2, head_dim]
  DType dtype = DType::kFloat32;

  RotaryPart parts[kMaxParts];
  int num_parts = 0;  // in [1, kMaxParts]

  int64_t table_len = 0;                // positions in the tables
  int64_t table_row_stride = 0;         // of cos and sin, all parts, >= rotary_dim / 2
  DType table_dtype = DType::kFloat32;  // float32 or dtype

  int64_t seqlen_offset = 0;  // added to every position but those of position_ids

  // The integers below lie in the op's device memory: int64, or int32 where index_is_int32.
  bool index_is_int32 = false;
  const void* seqlen_offsets = nullptr;  // [batch], with cu_seqlens [num_sequences]; null: 0
  // [num_sequences + 1], ascending from 0: sequence b is tokens [cu_seqlens[b], cu_seqlens[b + 1]).
  // null: sequence b is row b of the batch.
  const void* cu_seqlens = nullptr;
  int64_t num_sequences = 0;
  // [batch, seqlen] with these strides (0 repeats); excludes the fields above. null: see
  // "Positions".
  const void* position_ids = nullptr;
  int64_t position_batch_stride = 0;
  int64_t position_seq_stride = 0;

  bool interleaved = false;
  bool conjugate = false;  // turn by the negative angle
};

// `stream` is a cudaStream_t (null: the default stream) and is ignored on CPU. CUDA work is only
// enqueued: no allocation, no synchronisation, valid under graph capture. Returns an error, and has
// written nothing, if the arguments are not as described above.
Status Rotary(const RotaryParams& params, Device device, void* stream);

}  // namespace flashtrain
