"""LayerNorm and RMSNorm: `flashtrain.ops.layer_norm`, and a norm with a dense layer after it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flashtrain.ops._arguments import checked
from flashtrain.ops.fused_dense import fused_dense_func
from flashtrain.ops.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn

__all__ = ["RMSNorm", "layer_norm_fn", "layer_norm_linear_fn", "rms_norm_fn"]


@checked
def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Any:
    """norm(x + residual) linear_weight^T + linear_bias; with prenorm also x + residual.

    Args:
      x: [..., D].
      linear_weight: [O, D], and linear_bias: [O], of any dtype: cast to that of the norm's result.
      others: as for `layer_norm_fn`.

    Saved for backward: as by `layer_norm_fn` and `fused_dense_func`. The norm's result is kept, not
    computed again.
    """
    normed: Any = layer_norm_fn(
        x, norm_weight, norm_bias, residual, eps=eps, prenorm=prenorm,
        residual_in_fp32=residual_in_fp32, is_rms_norm=is_rms_norm,
    )  # fmt: skip
    z, total = normed if prenorm else (normed, None)
    bias = None if linear_bias is None else linear_bias.to(z.dtype)
    out = fused_dense_func(z, linear_weight.to(z.dtype), bias)
    return (out, total) if prenorm else out
