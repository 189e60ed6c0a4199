"""The forward Triton kernel of attention: online softmax over blocks of keys (FlashAttention-2)."""

import triton
import triton.language as tl

from flashtrain.ops.attention.triton.common import (
    LN_2,
    UNSPECIALIZED,
    keep_mask,
    load_tile,
    scores,
    sequence,
    store_tile,
    visible,
)


@triton.jit
def _attend(
    acc, row_sum, row_max, q, k, v, k_stride, v_stride, lo, hi, first_query, rng_row,
    seqlen_q, seqlen_k, scale, softcap, alibi_slope, window_left, window_right,
    seed, offset, threshold,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds keys [lo, hi) to the softmax of one block of queries. lo is a multiple of BLOCK_N."""
    position = first_query + tl.arange(0, BLOCK_M)[:, None] + (seqlen_k - seqlen_q)
    for start in tl.range(lo, hi, BLOCK_N):
        k_tile = load_tile(k, start, k_stride, seqlen_k, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
        products = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
        key = start + tl.arange(0, BLOCK_N)[None, :]
        score, _ = scores(
            products, position, key, scale, softcap, alibi_slope, HAS_SOFTCAP, HAS_ALIBI
        )
        if MASKED:
            seen = visible(position, key, seqlen_k, window_left, window_right, HAS_LEFT, HAS_RIGHT)
            score = tl.where(seen, score, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(score, 1))
        # A row that has seen no key yet has maximum -inf, and -inf - -inf is NaN.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
        p = tl.exp2(score - shift[:, None])
        rescale = tl.exp2(row_max - shift)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        row_max = new_max
        acc = acc * rescale[:, None]
        if HAS_DROPOUT:
            p = tl.where(
                keep_mask(seed, offset, rng_row, start, threshold, BLOCK_M, BLOCK_N), p, 0.0
            )
        v_tile = load_tile(v, start, v_stride, seqlen_k, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
    return acc, row_sum, row_max


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_forward_kernel(
    q, k, v, out, lse, alibi_slopes, cu_seqlens_q, cu_seqlens_k, rng_state,
    q_row_stride, q_head_stride, q_batch_stride,
    k_row_stride, k_head_stride, k_batch_stride,
    v_row_stride, v_head_stride, v_batch_stride,
    out_row_stride, out_head_stride, out_batch_stride,
    lse_head_stride, lse_batch_stride, alibi_batch_stride,
    num_heads, group, max_seqlen_q, max_seqlen_k, total_q, total_k,
    scale, softcap, window_left, window_right, threshold, keep_scale,
    VARLEN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of BLOCK_M queries of one head. Grid: blocks x heads x batch, blocks fastest."""
    blocks = tl.cdiv(max_seqlen_q, BLOCK_M)
    # Under a causal mask the last blocks have the most work: they go first.
    first_query = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    head = tl.program_id(0) // blocks % num_heads
    batch = tl.program_id(0) // blocks // num_heads
    q_start, seqlen_q = sequence(cu_seqlens_q, batch, max_seqlen_q, total_q, VARLEN)
    k_start, seqlen_k = sequence(cu_seqlens_k, batch, max_seqlen_k, total_k, VARLEN)
    if first_query >= seqlen_q:
        return
    if VARLEN:
        q += q_start * q_row_stride
        k += k_start * k_row_stride
        v += k_start * v_row_stride
        out += q_start * out_row_stride
        lse += q_start
    else:
        q += tl.cast(batch, tl.int64) * q_batch_stride
        k += tl.cast(batch, tl.int64) * k_batch_stride
        v += tl.cast(batch, tl.int64) * v_batch_stride
        out += tl.cast(batch, tl.int64) * out_batch_stride
        lse += tl.cast(batch, tl.int64) * lse_batch_stride
    q += tl.cast(head, tl.int64) * q_head_stride
    k += tl.cast(head // group, tl.int64) * k_head_stride
    v += tl.cast(head // group, tl.int64) * v_head_stride
    out += tl.cast(head, tl.int64) * out_head_stride
    lse += tl.cast(head, tl.int64) * lse_head_stride

    alibi_slope = 0.0
    if HAS_ALIBI:
        alibi_slope = tl.load(alibi_slopes + batch * alibi_batch_stride + head)
    query = first_query + tl.arange(0, BLOCK_M)
    rng_row = (q_start + query) * num_heads + head
    seed, offset = 0, 0
    if HAS_DROPOUT:
        seed, offset = tl.load(rng_state), tl.load(rng_state + 1)

    q_tile = load_tile(q, first_query, q_row_stride, seqlen_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)

    # Keys [lo, full) are seen by all queries of the block, [full, hi) by some.
    first_position = first_query + seqlen_k - seqlen_q
    lo, hi, full = 0, seqlen_k, seqlen_k
    if HAS_RIGHT:
        full = tl.minimum(seqlen_k, tl.maximum(0, first_position + window_right + 1))
        hi = tl.minimum(seqlen_k, tl.maximum(0, first_position + BLOCK_M + window_right))
    if HAS_LEFT:
        lo = tl.maximum(0, first_position - window_left) // BLOCK_N * BLOCK_N
        full = lo
    else:
        full = full // BLOCK_N * BLOCK_N
        acc, row_sum, row_max = _attend(
            acc, row_sum, row_max, q_tile, k, v, k_row_stride, v_row_stride, lo, full,
            first_query, rng_row, seqlen_q, seqlen_k, scale, softcap, alibi_slope,
            window_left, window_right, seed, offset, threshold,
            False, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, q_tile, k, v, k_row_stride, v_row_stride, full, hi,
        first_query, rng_row, seqlen_q, seqlen_k, scale, softcap, alibi_slope,
        window_left, window_right, seed, offset, threshold,
        True, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip

    # A row that sees nothing: sum 0, output 0, log-sum-exp -inf.
    acc = acc * (tl.where(row_sum == 0.0, 0.0, keep_scale / row_sum))[:, None]
    store_tile(out, first_query, out_row_stride, seqlen_q, acc, BLOCK_M, HEAD_DIM, BLOCK_D)
    log_sum = tl.where(row_sum == 0.0, float("-inf"), (row_max + tl.log2(row_sum)) * LN_2)
    tl.store(lse + query, log_sum, mask=query < seqlen_q)
