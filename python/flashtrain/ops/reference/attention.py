"""Scaled dot product attention in plain torch.

`attention` is the definition, which stores the scores. `flash_attn_func` and
`flash_attn_varlen_func` have the signatures of flashtrain.ops.attention, on top of torch's own
attention: the path of a model with every fusion off.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flashtrain.ops.reference.dropout import dropout_mask
from flashtrain.ops.reference.sequences import sequence_ids


def visible_keys(
    seqlen_q: int, seqlen_k: int, window_size: tuple[int, int], device: torch.device
) -> Tensor:
    """Which keys a query sees, bool [seqlen_q, seqlen_k]; -1 in window_size: no limit.

    The last query is at the position of the last key (bottom right alignment).
    """
    position = torch.arange(seqlen_q, device=device)[:, None] + (seqlen_k - seqlen_q)
    key = torch.arange(seqlen_k, device=device)[None, :]
    left, right = window_size
    mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if left >= 0:
        mask &= key >= position - left
    if right >= 0:
        mask &= key <= position + right
    return mask


def attention_scores(
    q: Tensor,
    k: Tensor,
    *,
    softmax_scale: float,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """softcap * tanh(scale * q k^T / softcap) - slope * |distance|; -inf where a key is not seen.

    Without softcap, the first term is scale * q k^T.

    Args:
      q: [B, Sq, H, D].
      k: [B, Sk, Hk, D], H a multiple of Hk: neighboring query heads share a key head.
      window_size: keys seen before and after the query's position; -1: all.
      alibi_slopes: [H] or [B, H].

    Returns [B, H, Sq, Sk].
    """
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q * softmax_scale, k)
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    if alibi_slopes is not None:
        position = torch.arange(seqlen_q, device=q.device)[:, None] + (seqlen_k - seqlen_q)
        distance = (position - torch.arange(seqlen_k, device=q.device)[None, :]).abs()
        scores = scores - alibi_slopes.to(scores.dtype)[..., None, None] * distance
    return scores.masked_fill(~visible_keys(seqlen_q, seqlen_k, window_size, q.device), -math.inf)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    keep_mask: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """dropout(softmax(attention_scores)) v of one batch of sequences of equal lengths.

    Args:
      q: [B, Sq, H, D].
      k, v: [B, Sk, Hk, D].
      softmax_scale: 1 / sqrt(D) when None.
      causal: no key after the query's position; as window_size (left, 0).
      keep_mask: [B, H, Sq, Sk], nonzero = kept; survivors are scaled by 1 / (1 - dropout_p).
      compute_dtype: see the package's docstring.
      others: as in `attention_scores`.

    Returns out [B, Sq, H, D] in q's dtype or `compute_dtype`, and the log-sum-exp [B, H, Sq]. A
    query that sees no key gives 0 and -inf.
    """
    out_dtype = q.dtype
    if compute_dtype is not None:
        out_dtype = compute_dtype
        q, k, v = (t.to(compute_dtype) for t in (q, k, v))
    scores = attention_scores(
        q,
        k,
        softmax_scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        window_size=(window_size[0], 0) if causal else window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
    )
    lse = torch.logsumexp(scores, dim=-1)
    # softmax of a row of -inf is NaN, and so is its gradient.
    blind = (scores == -math.inf).all(-1, keepdim=True)
    probabilities = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1)
    probabilities = probabilities.masked_fill(blind, 0.0)
    if keep_mask is not None:
        probabilities = torch.where(keep_mask != 0, probabilities / (1.0 - dropout_p), 0.0)
    v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    return torch.einsum("bhij,bjhd->bihd", probabilities, v).to(out_dtype), lse


def attention_keep_mask(
    rng_state: Tensor,
    batch: int,
    num_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    dropout_p: float,
    first_row: int = 0,
) -> Tensor:
    """The dropout mask [B, H, Sq, Sk] of our kernels.

    Element (b, h, i, j) is that of row (first_row + b * Sq + i) * H + h and column j in
    `dropout_mask`; first_row is the row of q where the first sequence begins (cu_seqlens).
    """
    begin = first_row * num_heads
    rows = dropout_mask(rng_state, begin + batch * seqlen_q * num_heads, seqlen_k, dropout_p)
    return rows[begin:].view(batch, seqlen_q, num_heads, seqlen_k).transpose(1, 2)


# --- The signatures of flashtrain.ops.attention ---------------------------------------------------


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    is_causal: bool,
    alibi_slopes: Tensor | None,
    distance: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """By torch's attention. `distance`: from key to query, for ALiBi; and `mask`; both to
    [B, 1, Sq, Sk]."""
    if alibi_slopes is not None:
        assert distance is not None
        dtype = torch.promote_types(q.dtype, torch.float32)
        bias = (-alibi_slopes.to(dtype)[..., None, None] * distance.abs()).to(q.dtype)
        mask = bias if mask is None else bias.masked_fill(~mask, -math.inf)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=softmax_scale,
        enable_gqa=k.shape[2] != q.shape[2],
    )
    return out.transpose(1, 2)


def _window_mask(distance: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor | None:
    """Which keys a query sees; None: every one."""
    left, right = window_size[0], 0 if causal else window_size[1]
    mask = None
    if right >= 0:
        mask = distance >= -right
    if left >= 0:
        near = distance <= left
        mask = near if mask is None else mask & near
    return mask


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """dropout(softmax(scores)) v for a batch of sequences of equal lengths.

    Args:
      mask: bool, to [B, 1, Sq, Sk], true where a query sees a key; replaces causal and window_size.
      others: as in flashtrain.ops.attention; no softcap. A query must see at least one key.
    """
    assert softcap == 0.0
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    is_plain = causal and mask is None and window_size[0] < 0 and alibi_slopes is None
    is_causal = False
    if is_plain and seqlen_q == seqlen_k:  # where torch.compile has lengths as symbols, no bool
        is_causal = True
    distance = None
    if not is_causal:
        queries = torch.arange(seqlen_k - seqlen_q, seqlen_k, device=q.device)
        distance = queries[:, None] - torch.arange(seqlen_k, device=q.device)
        if mask is None:
            mask = _window_mask(distance, causal, window_size)
    return _plain(q, k, v, dropout_p, softmax_scale, is_causal, alibi_slopes, distance, mask)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    *,
    rows: int = 1,
) -> Tensor:
    """`flash_attn_func` for sequences one after the other, q [total_q, H, D], by a mask.

    Args:
      rows: into so many rows of one length the tokens fall, without a sequence in two of them: the
        mask is [rows, total_q / rows, total_k / rows].
      others: as in flashtrain.ops.attention; alibi_slopes [H].
    """
    assert softcap == 0.0
    ids_q, ids_k = sequence_ids(cu_seqlens_q, q.shape[0]), sequence_ids(cu_seqlens_k, k.shape[0])
    # Counted from the end of the sequence, where the last query meets the last key.
    ends_q, ends_k = F.pad(cu_seqlens_q[1:], (0, 1)), F.pad(cu_seqlens_k[1:], (0, 1))
    queries = torch.arange(q.shape[0], device=q.device) - ends_q[ids_q]
    keys = torch.arange(k.shape[0], device=k.device) - ends_k[ids_k]
    ids_q, queries = (t.view(rows, 1, -1, 1) for t in (ids_q, queries))
    ids_k, keys = (t.view(rows, 1, 1, -1) for t in (ids_k, keys))
    distance, mask = queries - keys, ids_q == ids_k
    window = _window_mask(distance, causal, window_size)
    mask = mask if window is None else mask & window
    q, k, v = (t.unflatten(0, (rows, -1)) for t in (q, k, v))
    out = _plain(q, k, v, dropout_p, softmax_scale, False, alibi_slopes, distance, mask)
    return out.flatten(0, 1)
