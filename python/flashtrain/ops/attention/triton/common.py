"""What the forward and the backward Triton kernels of attention share.

Names: M queries, N keys, D head dim (padded to a power of two in registers). Of a sequence of
seqlen_q queries and seqlen_k keys, query i sits at key position i + seqlen_k - seqlen_q (bottom
right alignment), and sees the keys from window_left before it to window_right after it.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# Arguments whose value 1 or divisibility by 16 is not worth a compilation of its own.
UNSPECIALIZED = [
    "num_heads", "group", "max_seqlen_q", "max_seqlen_k", "total_q", "total_k", "window_left",
    "window_right", "threshold", "lse_head_stride", "lse_batch_stride", "alibi_batch_stride",
]  # fmt: skip


@triton.jit
def sequence(cu_seqlens, batch, max_seqlen, total, VARLEN: tl.constexpr):
    """First row of a sequence in its tensor's [rows, heads, D], and its length.

    With cu_seqlens the rows of all sequences follow each other, `total` in all; without, each has
    max_seqlen. Bounds that are wrong give wrong results, but lead to no row outside the tensor.
    """
    if VARLEN:
        total = tl.cast(total, tl.int64)
        start = tl.load(cu_seqlens + batch).to(tl.int64)
        start = tl.minimum(tl.maximum(start, 0), total)
        end = tl.load(cu_seqlens + batch + 1).to(tl.int64)
        end = tl.minimum(tl.maximum(end, start), total)
        return start, (end - start).to(tl.int32)
    else:
        return tl.cast(batch, tl.int64) * max_seqlen, max_seqlen


@triton.jit
def tile_pointers(
    base, row, stride_row, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Pointers of rows [row, row + ROWS) as [ROWS, BLOCK_D]; 64-bit arithmetic up to the tile."""
    first = base + tl.cast(row, tl.int64) * stride_row
    return first + tl.arange(0, ROWS)[:, None] * stride_row + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def load_tile(
    base,
    row,
    stride_row,
    num_rows,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):
    """Rows [row, row + ROWS) as [ROWS, BLOCK_D]; 0 past num_rows and past HEAD_DIM."""
    pointers = tile_pointers(base, row, stride_row, ROWS, HEAD_DIM, BLOCK_D)
    in_rows = row + tl.arange(0, ROWS)[:, None] < num_rows
    in_head = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM
    if CHECK_ROWS:
        if HEAD_DIM == BLOCK_D:
            return tl.load(pointers, mask=in_rows, other=0.0)
        else:
            return tl.load(pointers, mask=in_rows & in_head, other=0.0)
    else:
        if HEAD_DIM == BLOCK_D:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=in_head, other=0.0)


@triton.jit
def store_tile(
    base,
    row,
    stride_row,
    num_rows,
    tile,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pointers = tile_pointers(base, row, stride_row, ROWS, HEAD_DIM, BLOCK_D)
    mask = row + tl.arange(0, ROWS)[:, None] < num_rows
    if HEAD_DIM != BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def visible(
    position,
    key,
    seqlen_k,
    window_left,
    window_right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """Whether the query at `position` sees `key`; the two broadcast against each other."""
    mask = key < seqlen_k
    if HAS_RIGHT:
        mask = mask & (key <= position + window_right)
    if HAS_LEFT:
        mask = mask & (key >= position - window_left)
    return mask


@triton.jit
def scores(
    products,
    position,
    key,
    scale,
    softcap,
    alibi_slope,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
):
    """Scores in units of ln 2 out of q k^T, and tanh of the softcap (else the products again)."""
    tanh = products
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (e^2x + 1), right at both infinities.
        tanh = 1.0 - 2.0 / (tl.exp2(products * (2.0 * scale / softcap * LOG2_E)) + 1.0)
        result = tanh * (softcap * LOG2_E)
    else:
        result = products * (scale * LOG2_E)
    if HAS_ALIBI:
        result -= tl.abs(position - key).to(tl.float32) * (alibi_slope * LOG2_E)
    return result, tanh


@triton.jit
def keep_mask(seed, offset, rng_row, first_key, threshold, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """What dropout keeps of a tile: cc/common/philox.h by row `rng_row` [ROWS] and key.

    first_key is a multiple of 4. A Philox block is four neighbouring keys.
    """
    group = first_key // 4 + tl.arange(0, KEYS // 4)
    zeros = tl.zeros([ROWS, KEYS // 4], dtype=tl.uint32)
    row_low = tl.cast(rng_row & 0xFFFFFFFF, tl.uint32)
    row_high = tl.cast(rng_row >> 32, tl.uint32)
    offset_low = tl.cast(offset & 0xFFFFFFFF, tl.uint32)
    offset_high = tl.cast(offset >> 32, tl.uint32)
    word0, word1, word2, word3 = tl.philox(
        seed,
        zeros + tl.cast(group[None, :], tl.uint32),
        zeros + row_low[:, None],
        zeros + offset_low,
        zeros + (offset_high + row_high)[:, None],
    )
    threshold = tl.cast(threshold, tl.uint32)
    even = tl.join((word0 >= threshold).to(tl.int8), (word2 >= threshold).to(tl.int8))
    odd = tl.join((word1 >= threshold).to(tl.int8), (word3 >= threshold).to(tl.int8))
    return tl.join(even, odd).reshape(ROWS, KEYS) != 0
