"""Rotary position embedding in plain torch, and the frequencies of its context extensions."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    interleaved: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Turns pairs of x's first elements by the angles of its tokens' positions.

    Args:
      x: [..., heads, head_dim].
      cos, sin: [table_len, rotary_dim / 2].
      positions: [...], int64, indices into the tables.
      interleaved: pairs are (2i, 2i + 1) rather than (i, i + rotary_dim / 2).
      compute_dtype: see the package's docstring.

    Returns x's shape, in x's dtype or `compute_dtype`.
    """
    dtype = x.dtype if compute_dtype is None else compute_dtype
    x, cos, sin = (t.to(dtype) for t in (x, cos, sin))
    cos, sin = (t[positions].unsqueeze(-2) for t in (cos, sin))
    rotary_dim = 2 * cos.shape[-1]
    rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    if interleaved:
        a, b = rotated[..., ::2], rotated[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = rotated.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([turned, rest], -1)
