"""Attention with all its masks, in plain torch: the path with every fusion off.

Legend: B batch, T queries, S keys, H heads, G heads of keys and values (H is a multiple of G),
K head dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def alibi_slopes(num_heads: int, device: torch.device | None = None) -> Tensor:
    """fp32 [H]: the slopes of Press et al. 2022 (https://arxiv.org/abs/2108.12409).

    For H a power of two, 2^(-8 i / H) for i = 1..H; else those of the next smaller power of two,
    and then every other one of twice that. Computed on the device: a CUDA graph can capture no copy
    from the host.
    """
    power = 1 << (num_heads.bit_length() - 1)
    options = {"dtype": torch.float64, "device": device}
    steps = torch.arange(1, power + 1, **options) / power
    if num_heads > power:
        between = torch.arange(1, 2 * (num_heads - power), 2, **options) / (2 * power)
        steps = torch.cat([steps, between])
    return torch.exp2(-8.0 * steps).float()


def document_ids(cu_seqlens: Tensor, batch: int, seq_len: int) -> Tensor:
    """int64 [B, T]: which of the sequences of `cu_seqlens` (int32 [N + 1]) a token belongs to."""
    tokens = torch.arange(batch * seq_len, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.bucketize(tokens, cu_seqlens, right=True).view(batch, seq_len)


def _mask(
    distance_TS: Tensor,
    causal: bool,
    window: tuple[int, int],
    cu_seqlens: Tensor | None,
    batch: int,
) -> Tensor | None:
    """bool, to [B, 1, T, S]: which key a query may see; None: every one."""
    mask = None
    left, right = window[0], 0 if causal else window[1]
    if right >= 0:
        mask = distance_TS >= -right
    if left >= 0:
        near = distance_TS <= left
        mask = near if mask is None else mask & near
    if cu_seqlens is not None:
        ids_BT = document_ids(cu_seqlens, batch, distance_TS.shape[0])
        same = (ids_BT[:, :, None] == ids_BT[:, None, :]).unsqueeze(1)
        mask = same if mask is None else mask & same
    return mask


def plain_attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    *,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    alibi: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(softmax_scale * q k^T + bias) v for each head.

    Args:
        q_BTHK: [B, T, H, K].
        k_BSGK, v_BSGK: [B, S, G, K]; head h reads head h * G // H of them.
        dropout_p: probability of dropping an attention weight.
        softmax_scale: 1 / sqrt(K) when None.
        causal: query t sees keys up to t + S - T.
        window: how far before and after t + S - T a query sees; -1: without bound.
        alibi: fp32 [H], slopes: -slope * |t + S - T - s| is added to the scores.
        cu_seqlens: int32 [N + 1], bounds of sequences among the B * T tokens; each sees itself
            alone. S is T then, and no sequence spans two rows.
        mask: bool, to [B, 1, T, S], true where a query sees a key; replaces causal, window and
            cu_seqlens.

    Returns:
        [B, T, H, K]. A query must see at least one key.
    """
    seq_len, num_keys = q_BTHK.shape[1], k_BSGK.shape[1]
    device = q_BTHK.device
    is_plain = causal and mask is None and window[0] < 0 and alibi is None and cu_seqlens is None
    is_causal = False
    if is_plain and seq_len == num_keys:  # where torch.compile has lengths as symbols, no bool
        is_causal = True
    if not is_causal:
        queries = torch.arange(num_keys - seq_len, num_keys, device=device)
        distance_TS = queries[:, None] - torch.arange(num_keys, device=device)
        if mask is None:
            mask = _mask(distance_TS, causal, window, cu_seqlens, q_BTHK.shape[0])
        if alibi is not None:
            dtype = torch.promote_types(q_BTHK.dtype, torch.float32)
            bias = (-alibi.to(dtype)[:, None, None] * distance_TS.abs()).to(q_BTHK.dtype)
            mask = bias if mask is None else bias.masked_fill(~mask, -math.inf)
    y_BHTK = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BSGK.transpose(1, 2),
        v_BSGK.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=softmax_scale,
        enable_gqa=k_BSGK.shape[2] != q_BTHK.shape[2],
    )
    return y_BHTK.transpose(1, 2)
