"""Dense layers and the two-layer MLP in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_approx": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sqrelu": lambda x: F.relu(x).square(),
}


def fused_dense(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, compute_dtype: torch.dtype | None = None
) -> Tensor:
    """x weight^T + bias, of x [..., I], weight [O, I], bias [O]; in `compute_dtype` if given."""
    if compute_dtype is not None:
        x, weight, bias = (None if t is None else t.to(compute_dtype) for t in (x, weight, bias))
    return F.linear(x, weight, bias)


def fused_mlp(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Tensor | None,
    bias2: Tensor | None,
    activation: str,
    *,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """fused_dense, the activation, fused_dense; in `compute_dtype` if given."""
    hidden = fused_dense(x, weight1, bias1, compute_dtype=compute_dtype)
    return fused_dense(
        _ACTIVATIONS[activation](hidden), weight2, bias2, compute_dtype=compute_dtype
    )
