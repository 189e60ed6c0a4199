// Scaled dot product attention on the CPU, forward and backward, in blocks (FlashAttention-2, Dao
// 2023, arXiv:2307.08691): the scores are never in memory as a whole. On CUDA the op is a Triton
// kernel, or one of those that come with torch: see python/flashtrain/ops/attention.
//
//   score = softcap * tanh(softmax_scale * q k^T / softcap) - alibi_slope * |position - key|
//   out   = dropout(softmax(score)) v,   lse = log(sum(exp(score)))
//
// for each query head, over the keys that the query sees. Without softcap the score is
// softmax_scale * q k^T. Query i of a sequence of seqlen_q queries and seqlen_k keys is at position
// i + seqlen_k - seqlen_q (bottom right alignment) and sees the keys [position - window_left,
// position + window_right]; a causal mask is window_right = 0. A query that sees no key has out 0,
// lse -inf and no part in any gradient.
//
// num_heads is a multiple of num_heads_k: query head h uses key and value head
// h / (num_heads / num_heads_k) (grouped-query attention).
//
// Numerics: all arithmetic is fp32, whatever the dtype; lse is fp32. NaN and inf propagate as in
// the plain expression. Results are bitwise deterministic for one instruction set, for any number
// of threads.
//
// Cost: 4 * seqlen_q * seqlen_k * head_dim FLOPs a head forward, 10 backward, those of blocks that
// the window hides left out. Forward runs in parallel over (sequence, head, 64 queries), backward
// over (sequence, key head).
//
// Dropout: weight (query, key) is kept or dropped by a pure function of (seed, offset, row, key),
// with row = q_row * num_heads + head and q_row the query's row in q, counted from the first row of
// the first sequence (common/philox.h). So backward regenerates the mask, and a batch of sequences
// has the same mask as the same sequences one after the other with cu_seqlens.
//
//   AttentionForwardParams p;
//   p.batch = 8, p.max_seqlen_q = p.max_seqlen_k = 1024;
//   p.num_heads = p.num_heads_k = 12, p.head_dim = 64;
//   p.q = {q, 1024 * 2304, 2304, 64};  // packed [batch, 1024, 3, 12, 64]: k at q + 768, v at 1536
//   ...
//   p.softmax_scale = 0.125f, p.window_right = 0;
//   Status s = AttentionForward(p);
#pragma once

#include <cstdint>

#include "flashtrain/common/dtype.h"
#include "flashtrain/common/status.h"

namespace flashtrain {

// A tensor [batch, seqlen, heads, head_dim], or with cu_seqlens [total, heads, head_dim]. Head dim
// has unit stride, the others any, in elements; batch_stride is not read with cu_seqlens.
struct AttentionTensor {
  void* data = nullptr;  // null only where the tensor has no elements; inputs are only read
  int64_t batch_stride = 0, row_stride = 0, head_stride = 0;
};

// What forward and backward are both told.
struct AttentionParams {
  int64_t batch = 0;  // >= 0, number of sequences
  // >= 0; with cu_seqlens: at least the longest sequence's, an upper bound that costs nothing.
  int64_t max_seqlen_q = 0;
  int64_t max_seqlen_k = 0;
  int64_t num_heads = 0;          // >= 1, a multiple of num_heads_k
  int64_t num_heads_k = 0;        // >= 1
  int64_t head_dim = 0;           // >= 1
  DType dtype = DType::kFloat32;  // of all AttentionTensors

  // [batch + 1], nondecreasing from 0 to total: sequence b has the rows cu_seqlens[b] to
  // cu_seqlens[b + 1]. Both null: every sequence has max_seqlen rows, and the totals are not read.
  const int32_t* cu_seqlens_q = nullptr;
  const int32_t* cu_seqlens_k = nullptr;
  int64_t total_q = 0;
  int64_t total_k = 0;

  float softmax_scale = 1.0f;  // >= 0
  float softcap = 0.0f;        // >= 0; 0: none
  int64_t window_left = -1;    // -1: no limit
  int64_t window_right = -1;   // -1: no limit; 0: causal

  const float* alibi_slopes = nullptr;  // [num_heads], or [batch, num_heads]; null: none
  int64_t alibi_batch_stride = 0;       // 0 for [num_heads]

  float dropout_p = 0.0f;               // in [0, 1)
  const uint64_t* rng_state = nullptr;  // {seed, offset}; null allowed where dropout_p is 0

  AttentionTensor q, k, v;
  AttentionTensor out;  // written by forward, read by backward

  // [batch, num_heads, max_seqlen_q], or with cu_seqlens [num_heads, total_q]: strides of a head
  // and of a sequence, in elements; queries are adjacent. Written by forward, read by backward.
  float* lse = nullptr;
  int64_t lse_head_stride = 0, lse_batch_stride = 0;
};

using AttentionForwardParams = AttentionParams;

struct AttentionBackwardParams : AttentionParams {
  AttentionTensor dout;        // gradient of out
  AttentionTensor dq, dk, dv;  // outputs; must not overlap inputs or each other
};

// Return an error, and have written nothing, if the arguments are not as described above. Throw
// std::bad_alloc where there is no memory for a task: up to 10 * head_dim floats for each query and
// key of the longest sequence, in each thread.
Status AttentionForward(const AttentionForwardParams& params);
Status AttentionBackward(const AttentionBackwardParams& params);

}  // namespace flashtrain
