"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864) in plain torch.

Component pairs of queries and keys are rotated by position * base^(-2i / R), i the pair, so that
their products depend on the distance of positions only. The functions have the signatures of
flashtrain.ops.rotary, and write to none of their arguments.

Legend: B batch, S sequence length, T tokens of all sequences, H heads, D head dim, R rotary dim.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor

from flashtrain.ops.reference.sequences import sequence_ids


def rotary_tables(
    positions: Tensor, rotary_dim: int, base: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position and pair.

    Args:
      positions: integers [...].
      rotary_dim: R.
      base: of the geometric series of wave lengths.
      dtype: of the result.

    Returns (cos, sin), [..., R / 2]. Angles are computed in fp64: in fp32 those of position 8,192
    are off by up to 5e-4.
    """
    # A number, not a symbol, where torch.compile traces a share of the head dim as one.
    rotary_dim = operator.index(rotary_dim)
    pairs = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions.double().unsqueeze(-1) * base ** (-pairs / rotary_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def token_positions(
    x: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """The row of the tables that each token turns by, int64, to [B, S] or [T]; -1: none."""
    if position_ids is not None:
        return position_ids.long()
    offsets = torch.as_tensor(seqlen_offsets, device=x.device).long()
    if cu_seqlens is None:
        return torch.arange(x.shape[1], device=x.device) + offsets.unsqueeze(-1)
    num_sequences = cu_seqlens.shape[0] - 1
    ids = sequence_ids(cu_seqlens, x.shape[0])
    offsets = F.pad(offsets.expand(num_sequences), (0, 1))
    positions = torch.arange(x.shape[0], device=x.device) - cu_seqlens.long()[ids] + offsets[ids]
    return positions.where(ids < num_sequences, -1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dtype: torch.dtype) -> Tensor:
    """x [..., H, D] by one row of the tables for each token, in `dtype`."""
    rotary_dim = 2 * cos.shape[-1]
    # A head's axis between positions and components.
    cos, sin = cos.to(dtype).unsqueeze(-2), sin.to(dtype).unsqueeze(-2)
    rotated = x[..., :rotary_dim].to(dtype)
    if interleaved:
        even, odd = rotated.unflatten(-1, (-1, 2)).unbind(-1)
        pairs = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
        return pairs.flatten(-2)
    first, second = rotated.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    *,
    position_ids: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rotates the first R elements of every head; the rest stays.

    Args:
      position_ids: of any shape that broadcasts to the tokens'.
      compute_dtype: see the package's docstring. None: the larger of x's and the tables' dtype.
      others: as in flashtrain.ops.rotary.

    Returns x's shape, in x's dtype or `compute_dtype`.
    """
    out_dtype = x.dtype if compute_dtype is None else compute_dtype
    dtype = torch.promote_types(x.dtype, cos.dtype) if compute_dtype is None else compute_dtype
    positions = None
    if cu_seqlens is None and position_ids is None and not isinstance(seqlen_offsets, Tensor):
        here = slice(seqlen_offsets, seqlen_offsets + x.shape[1])
        cos, sin = cos[here], sin[here]
    else:
        positions = token_positions(x, seqlen_offsets, cu_seqlens, position_ids)
        cos, sin = cos[positions.clamp(min=0)], sin[positions.clamp(min=0)]
    rest = x[..., 2 * cos.shape[-1] :]
    turned = _turned(x, cos, sin, interleaved, dtype)
    out = torch.cat((turned.to(out_dtype), rest.to(out_dtype)), dim=-1)
    if positions is not None and cu_seqlens is not None:
        out = out.where((positions >= 0)[:, None, None], x.to(out_dtype))
    return out


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    position_ids: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Queries and keys of a packed tensor rotated, in a new one; see flashtrain.ops.rotary."""

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return apply_rotary_emb(
            x, cos, sin, interleaved, False, seqlen_offsets, cu_seqlens,
            position_ids=position_ids, compute_dtype=compute_dtype,
        )  # fmt: skip

    cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
    if qkv.dim() == (5 if cu_seqlens is None else 4):
        q, k, v = qkv.unbind(-3)
        q, k = rotate(q, cos, sin), rotate(k, cos_k, sin_k)
        return torch.stack((q, k, v.to(q.dtype)), dim=-3)
    assert num_heads_q is not None
    num_heads_k = (qkv.shape[-2] - num_heads_q) // 2
    q, k, v = qkv.split((num_heads_q, num_heads_k, num_heads_k), dim=-2)
    q, k = rotate(q, cos, sin), rotate(k, cos_k, sin_k)
    return torch.cat((q, k, v.to(q.dtype)), dim=-2)


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    position_ids: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """The keys of kv rotated, in a new tensor; see flashtrain.ops.rotary."""
    k, v = kv.unbind(-3)
    k = apply_rotary_emb(
        k, cos, sin, interleaved, False, seqlen_offsets, cu_seqlens,
        position_ids=position_ids, compute_dtype=compute_dtype,
    )  # fmt: skip
    return torch.stack((k, v.to(k.dtype)), dim=-3)
