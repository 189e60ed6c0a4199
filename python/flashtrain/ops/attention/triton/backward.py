"""The backward Triton kernels of attention: one for dq, one for dk and dv, no atomics.

    p = exp(score - lse),  dp = dropout(dout v^T),  delta = sum over D of dout * out
    ds = p * (dp - delta)
    dq = scale * ds k,     dk = scale * ds^T q,     dv = dropout(p)^T dout

Each gradient is summed by one program in a fixed order, so results are bitwise deterministic. That
costs 7 matrix products where atomics on dq would need 5.
"""

import triton
import triton.language as tl

from flashtrain.ops.attention.triton.common import (
    LOG2_E,
    UNSPECIALIZED,
    keep_mask,
    load_tile,
    scores,
    sequence,
    store_tile,
    visible,
)


@triton.jit
def _load_lse(lse, query, seqlen_q):
    """The log-sum-exp in units of ln 2; +inf, which makes p 0, for rows that see or are nothing."""
    value = tl.load(lse + query, mask=query < seqlen_q, other=float("inf")) * LOG2_E
    return tl.where(value == float("-inf"), float("inf"), value)


@triton.jit
def _dq_keys(
    dq, q, dout, lse, delta, k, v, k_stride, v_stride, lo, hi, first_query, rng_row,
    seqlen_q, seqlen_k, scale, softcap, alibi_slope, window_left, window_right,
    seed, offset, threshold, keep_scale,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what keys [lo, hi) give to dq of one block of queries. lo is a multiple of BLOCK_N."""
    position = first_query + tl.arange(0, BLOCK_M)[:, None] + (seqlen_k - seqlen_q)
    for start in tl.range(lo, hi, BLOCK_N):
        k_tile = load_tile(k, start, k_stride, seqlen_k, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
        v_tile = load_tile(v, start, v_stride, seqlen_k, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
        products = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
        key = start + tl.arange(0, BLOCK_N)[None, :]
        score, tanh = scores(
            products, position, key, scale, softcap, alibi_slope, HAS_SOFTCAP, HAS_ALIBI
        )
        p = tl.exp2(score - lse[:, None])
        if MASKED:
            seen = visible(position, key, seqlen_k, window_left, window_right, HAS_LEFT, HAS_RIGHT)
            p = tl.where(seen, p, 0.0)
        dp = tl.dot(dout, tl.trans(v_tile), input_precision=PRECISION)
        if HAS_DROPOUT:
            keep = keep_mask(seed, offset, rng_row, start, threshold, BLOCK_M, BLOCK_N)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if HAS_SOFTCAP:
            ds = ds * (1.0 - tanh * tanh)
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_backward_dq_kernel(
    q, k, v, out, dout, lse, delta, dq, alibi_slopes, cu_seqlens_q, cu_seqlens_k, rng_state,
    q_row_stride, q_head_stride, q_batch_stride,
    k_row_stride, k_head_stride, k_batch_stride,
    v_row_stride, v_head_stride, v_batch_stride,
    out_row_stride, out_head_stride, out_batch_stride,
    dout_row_stride, dout_head_stride, dout_batch_stride,
    dq_row_stride, dq_head_stride, dq_batch_stride,
    lse_head_stride, lse_batch_stride, alibi_batch_stride,
    num_heads, group, max_seqlen_q, max_seqlen_k, total_q, total_k,
    scale, softcap, window_left, window_right, threshold, keep_scale,
    VARLEN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and delta of one block of queries of one head. Grid as forward's."""
    blocks = tl.cdiv(max_seqlen_q, BLOCK_M)
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
        dout += q_start * dout_row_stride
        dq += q_start * dq_row_stride
        lse += q_start
        delta += q_start
    else:
        q += tl.cast(batch, tl.int64) * q_batch_stride
        k += tl.cast(batch, tl.int64) * k_batch_stride
        v += tl.cast(batch, tl.int64) * v_batch_stride
        out += tl.cast(batch, tl.int64) * out_batch_stride
        dout += tl.cast(batch, tl.int64) * dout_batch_stride
        dq += tl.cast(batch, tl.int64) * dq_batch_stride
        lse += tl.cast(batch, tl.int64) * lse_batch_stride
        delta += tl.cast(batch, tl.int64) * lse_batch_stride
    q += tl.cast(head, tl.int64) * q_head_stride
    k += tl.cast(head // group, tl.int64) * k_head_stride
    v += tl.cast(head // group, tl.int64) * v_head_stride
    out += tl.cast(head, tl.int64) * out_head_stride
    dout += tl.cast(head, tl.int64) * dout_head_stride
    dq += tl.cast(head, tl.int64) * dq_head_stride
    lse += tl.cast(head, tl.int64) * lse_head_stride
    delta += tl.cast(head, tl.int64) * lse_head_stride

    alibi_slope = 0.0
    if HAS_ALIBI:
        alibi_slope = tl.load(alibi_slopes + batch * alibi_batch_stride + head)
    query = first_query + tl.arange(0, BLOCK_M)
    rng_row = (q_start + query) * num_heads + head
    seed, offset = 0, 0
    if HAS_DROPOUT:
        seed, offset = tl.load(rng_state), tl.load(rng_state + 1)

    q_tile = load_tile(q, first_query, q_row_stride, seqlen_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    dout_tile = load_tile(
        dout, first_query, dout_row_stride, seqlen_q, BLOCK_M, HEAD_DIM, BLOCK_D, True
    )
    out_tile = load_tile(
        out, first_query, out_row_stride, seqlen_q, BLOCK_M, HEAD_DIM, BLOCK_D, True
    )
    row_delta = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + query, row_delta, mask=query < seqlen_q)
    row_lse = _load_lse(lse, query, seqlen_q)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)

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
        acc = _dq_keys(
            acc, q_tile, dout_tile, row_lse, row_delta, k, v, k_row_stride, v_row_stride, lo, full,
            first_query, rng_row, seqlen_q, seqlen_k, scale, softcap, alibi_slope,
            window_left, window_right, seed, offset, threshold, keep_scale,
            False, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    acc = _dq_keys(
        acc, q_tile, dout_tile, row_lse, row_delta, k, v, k_row_stride, v_row_stride, full, hi,
        first_query, rng_row, seqlen_q, seqlen_k, scale, softcap, alibi_slope,
        window_left, window_right, seed, offset, threshold, keep_scale,
        True, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    store_tile(dq, first_query, dq_row_stride, seqlen_q, acc * scale, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit
def _dkv_queries(
    dk, dv, k, v, q, dout, lse, delta, q_stride, dout_stride, lo, hi, first_key, q_start,
    num_heads, head, seqlen_q, seqlen_k, scale, softcap, alibi_slope, window_left, window_right,
    seed, offset, threshold, keep_scale,
    MASKED: tl.constexpr, EVEN_M: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what queries [lo, hi) give to dk and dv of one block of keys; all tiles transposed."""
    key = first_key + tl.arange(0, BLOCK_N)[:, None]
    for start in tl.range(lo, hi, BLOCK_M):
        q_tile = load_tile(q, start, q_stride, seqlen_q, BLOCK_M, HEAD_DIM, BLOCK_D, not EVEN_M)
        dout_tile = load_tile(
            dout, start, dout_stride, seqlen_q, BLOCK_M, HEAD_DIM, BLOCK_D, not EVEN_M
        )
        query = start + tl.arange(0, BLOCK_M)
        position = query[None, :] + (seqlen_k - seqlen_q)
        products = tl.dot(k, tl.trans(q_tile), input_precision=PRECISION)
        score, tanh = scores(
            products, position, key, scale, softcap, alibi_slope, HAS_SOFTCAP, HAS_ALIBI
        )
        p = tl.exp2(score - _load_lse(lse, query, seqlen_q)[None, :])
        if MASKED:
            seen = visible(position, key, seqlen_k, window_left, window_right, HAS_LEFT, HAS_RIGHT)
            p = tl.where(seen, p, 0.0)
        kept = p
        dp = tl.dot(v, tl.trans(dout_tile), input_precision=PRECISION)
        if HAS_DROPOUT:
            rng_row = (q_start + query) * num_heads + head
            keep = tl.trans(
                keep_mask(seed, offset, rng_row, first_key, threshold, BLOCK_M, BLOCK_N)
            )
            kept = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        dv = tl.dot(kept.to(dout_tile.dtype), dout_tile, dv, input_precision=PRECISION)
        row_delta = tl.load(delta + query, mask=query < seqlen_q, other=0.0)
        ds = p * (dp - row_delta[None, :])
        if HAS_SOFTCAP:
            ds = ds * (1.0 - tanh * tanh)
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _dkv_head(
    dk, dv, k, v, q, dout, lse, delta, alibi_slopes,
    q_row_stride, q_head_stride, dout_row_stride, dout_head_stride,
    lse_head_stride, alibi_batch_stride, lo, full, hi, first_key, q_start, batch,
    num_heads, head, seqlen_q, seqlen_k, scale, softcap, window_left, window_right,
    seed, offset, threshold, keep_scale,
    EVEN_M: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what one query head gives: queries [lo, full) with a mask, [full, hi) without."""
    q += tl.cast(head, tl.int64) * q_head_stride
    dout += tl.cast(head, tl.int64) * dout_head_stride
    lse += tl.cast(head, tl.int64) * lse_head_stride
    delta += tl.cast(head, tl.int64) * lse_head_stride
    alibi_slope = 0.0
    if HAS_ALIBI:
        alibi_slope = tl.load(alibi_slopes + batch * alibi_batch_stride + head)
    if HAS_LEFT or HAS_RIGHT:
        dk, dv = _dkv_queries(
            dk, dv, k, v, q, dout, lse, delta, q_row_stride, dout_row_stride, lo, full, first_key,
            q_start, num_heads, head, seqlen_q, seqlen_k, scale, softcap, alibi_slope,
            window_left, window_right, seed, offset, threshold, keep_scale,
            True, EVEN_M, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    if not HAS_LEFT:
        dk, dv = _dkv_queries(
            dk, dv, k, v, q, dout, lse, delta, q_row_stride, dout_row_stride, full, hi, first_key,
            q_start, num_heads, head, seqlen_q, seqlen_k, scale, softcap, alibi_slope,
            window_left, window_right, seed, offset, threshold, keep_scale,
            False, EVEN_M, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    return dk, dv


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_backward_dkv_kernel(
    q, k, v, dout, lse, delta, dk, dv, alibi_slopes, cu_seqlens_q, cu_seqlens_k, rng_state,
    q_row_stride, q_head_stride, q_batch_stride,
    k_row_stride, k_head_stride, k_batch_stride,
    v_row_stride, v_head_stride, v_batch_stride,
    dout_row_stride, dout_head_stride, dout_batch_stride,
    dk_row_stride, dk_head_stride, dk_batch_stride,
    dv_row_stride, dv_head_stride, dv_batch_stride,
    lse_head_stride, lse_batch_stride, alibi_batch_stride,
    num_heads, group, max_seqlen_q, max_seqlen_k, total_q, total_k,
    scale, softcap, window_left, window_right, threshold, keep_scale,
    VARLEN: tl.constexpr, EVEN_M: tl.constexpr, ONE_HEAD: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys of one key head, summed over the query heads that share it.

    Grid: blocks x key heads x batch, blocks fastest; under a causal mask the first have most work.
    """
    blocks = tl.cdiv(max_seqlen_k, BLOCK_N)
    first_key = tl.program_id(0) % blocks * BLOCK_N
    kv_heads = num_heads // group
    kv_head = tl.program_id(0) // blocks % kv_heads
    batch = tl.program_id(0) // blocks // kv_heads
    q_start, seqlen_q = sequence(cu_seqlens_q, batch, max_seqlen_q, total_q, VARLEN)
    k_start, seqlen_k = sequence(cu_seqlens_k, batch, max_seqlen_k, total_k, VARLEN)
    if first_key >= seqlen_k:
        return
    if VARLEN:
        q += q_start * q_row_stride
        k += k_start * k_row_stride
        v += k_start * v_row_stride
        dout += q_start * dout_row_stride
        dk += k_start * dk_row_stride
        dv += k_start * dv_row_stride
        lse += q_start
        delta += q_start
    else:
        q += tl.cast(batch, tl.int64) * q_batch_stride
        k += tl.cast(batch, tl.int64) * k_batch_stride
        v += tl.cast(batch, tl.int64) * v_batch_stride
        dout += tl.cast(batch, tl.int64) * dout_batch_stride
        dk += tl.cast(batch, tl.int64) * dk_batch_stride
        dv += tl.cast(batch, tl.int64) * dv_batch_stride
        lse += tl.cast(batch, tl.int64) * lse_batch_stride
        delta += tl.cast(batch, tl.int64) * lse_batch_stride
    k += tl.cast(kv_head, tl.int64) * k_head_stride
    v += tl.cast(kv_head, tl.int64) * v_head_stride
    dk += tl.cast(kv_head, tl.int64) * dk_head_stride
    dv += tl.cast(kv_head, tl.int64) * dv_head_stride
    seed, offset = 0, 0
    if HAS_DROPOUT:
        seed, offset = tl.load(rng_state), tl.load(rng_state + 1)

    k_tile = load_tile(k, first_key, k_row_stride, seqlen_k, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    v_tile = load_tile(v, first_key, v_row_stride, seqlen_k, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)

    # Queries [lo, full) see some of the keys, [full, hi) all that are in the sequence; the rows of
    # dk and dv past it are not stored.
    first_row = first_key - (seqlen_k - seqlen_q)
    lo, full, hi = 0, 0, seqlen_q
    if HAS_RIGHT:
        lo = tl.maximum(0, first_row - window_right) // BLOCK_M * BLOCK_M
        full = tl.maximum(0, first_row + BLOCK_N - 1 - window_right)
        full = tl.minimum(hi, tl.cdiv(full, BLOCK_M) * BLOCK_M)
    if HAS_LEFT:
        hi = tl.minimum(seqlen_q, tl.maximum(0, first_row + BLOCK_N + window_left))
        full = hi
    # The loop over one head would cost registers (0 to 600 bytes of spills a thread).
    if ONE_HEAD:
        dk_acc, dv_acc = _dkv_head(
            dk_acc, dv_acc, k_tile, v_tile, q, dout, lse, delta, alibi_slopes,
            q_row_stride, q_head_stride, dout_row_stride, dout_head_stride,
            lse_head_stride, alibi_batch_stride, lo, full, hi, first_key, q_start, batch,
            num_heads, kv_head, seqlen_q, seqlen_k, scale, softcap, window_left, window_right,
            seed, offset, threshold, keep_scale,
            EVEN_M, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    else:
        for head in tl.range(kv_head * group, (kv_head + 1) * group):
            dk_acc, dv_acc = _dkv_head(
                dk_acc, dv_acc, k_tile, v_tile, q, dout, lse, delta, alibi_slopes,
                q_row_stride, q_head_stride, dout_row_stride, dout_head_stride,
                lse_head_stride, alibi_batch_stride, lo, full, hi, first_key, q_start, batch,
                num_heads, head, seqlen_q, seqlen_k, scale, softcap, window_left, window_right,
                seed, offset, threshold, keep_scale,
                EVEN_M, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip
    dv_acc = dv_acc * keep_scale
    store_tile(dk, first_key, dk_row_stride, seqlen_k, dk_acc * scale, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_tile(dv, first_key, dv_row_stride, seqlen_k, dv_acc, BLOCK_N, HEAD_DIM, BLOCK_D)
