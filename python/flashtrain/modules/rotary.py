"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864), in plain torch.

Component pairs of queries and keys are rotated by position * base^(-2i / R), i the pair, so that
their products depend on the distance of positions only.

Legend: B batch, T sequence, H heads, K head dim, R rotary dim (even, at most K).
"""

import operator

import torch
from torch import Tensor


def rotary_tables(
    positions: Tensor, rotary_dim: int, base: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position and pair.

    Args:
        positions: integers [...].
        rotary_dim: R.
        base: of the geometric series of wave lengths.
        dtype: of the result.

    Returns:
        (cos, sin), [..., R / 2]. Angles are computed in fp64: in fp32 those of position 8,192 are
        off by up to 5e-4.
    """
    # A number, not a symbol, where torch.compile traces a share of the head dim as one.
    rotary_dim = operator.index(rotary_dim)
    pairs = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions.double().unsqueeze(-1) * base ** (-pairs / rotary_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotates the first R components of every head; the rest stays.

    Args:
        x_BTHK: [B, T, H, K].
        cos, sin: [T, R / 2] or [B, T, R / 2], see `rotary_tables`.
        interleaved: pairs are neighbours (GPT-J), else (i, i + R / 2) (GPT-NeoX).

    Returns:
        Like x_BTHK, computed in fp32 at least.
    """
    rotary_dim = 2 * cos.shape[-1]
    dtype = torch.promote_types(x_BTHK.dtype, cos.dtype)
    # A head's axis between positions and components.
    cos, sin = cos.to(dtype).unsqueeze(-2), sin.to(dtype).unsqueeze(-2)
    rotated, rest = x_BTHK[..., :rotary_dim].to(dtype), x_BTHK[..., rotary_dim:]
    if interleaved:
        even, odd = rotated.unflatten(-1, (-1, 2)).unbind(-1)
        pairs = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
        rotated = pairs.flatten(-2)
    else:
        first, second = rotated.chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return torch.cat((rotated.to(x_BTHK.dtype), rest), dim=-1)
