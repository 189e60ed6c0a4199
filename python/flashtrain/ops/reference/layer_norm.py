"""Dropout + add + LayerNorm or RMSNorm in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dropout_add_layer_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    *,
    dropout_p: float = 0.0,
    keep_mask: Tensor | None = None,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    zero_centered_weight: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """x = layerscale * dropout(rowscale * x0) + residual;  z = norm(x) * weight + bias.

    Args:
      x0: [..., cols].
      residual: [..., cols], or None for zero.
      weight, bias, layerscale: [cols].
      epsilon: added to the variance, or to the mean square.
      dropout_p: survivors are scaled by 1 / (1 - dropout_p).
      keep_mask: [..., cols], nonzero = kept; None: nothing is dropped.
      rowscale: [...], a factor for each row.
      residual_in_fp32: without a residual, x is kept in float32.
      is_rms_norm: divide by the root mean square, without subtracting the mean.
      zero_centered_weight: scale by 1 + weight.
      compute_dtype: see the module's docstring.

    Returns z in x0's dtype and x in the residual's, or both in `compute_dtype`.
    """
    if residual is not None:
        x_dtype = residual.dtype
    else:
        x_dtype = torch.float32 if residual_in_fp32 else x0.dtype
    z_dtype = x0.dtype
    if compute_dtype is not None:
        x_dtype = z_dtype = compute_dtype
        x0, residual, weight, bias, rowscale, layerscale = (
            None if t is None else t.to(compute_dtype)
            for t in (x0, residual, weight, bias, rowscale, layerscale)
        )

    x = x0 if rowscale is None else x0 * rowscale.unsqueeze(-1).to(x0.dtype)
    if keep_mask is not None:
        x = torch.where(keep_mask != 0, x / (1.0 - dropout_p), 0.0)
    if layerscale is not None:
        x = x * layerscale.to(x.dtype)
    x = x.to(x_dtype)
    if residual is not None:
        x = x + residual

    weight = weight.to(x_dtype) + (1.0 if zero_centered_weight else 0.0)
    bias = None if bias is None else bias.to(x_dtype)
    if is_rms_norm:
        z = F.rms_norm(x, (x.shape[-1],), weight, epsilon)
        z = z if bias is None else z + bias
    else:
        z = F.layer_norm(x, (x.shape[-1],), weight, bias, epsilon)
    return z.to(z_dtype), x


def parallel_residual(
    x0: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    weight0: Tensor,
    bias0: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    epsilon: float,
    *,
    dropout_p: float = 0.0,
    keep_mask0: Tensor | None = None,
    keep_mask1: Tensor | None = None,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    zero_centered_weight: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """x = dropout(x0) + dropout(x1) + residual: [z0, z1, x], or [z0, x] without weight1.

    The arguments are those of `dropout_add_layer_norm`, one weight, bias and mask for each branch.
    """
    ones = torch.ones_like(weight0)

    def add(branch: Tensor, mask: Tensor | None, total: Tensor | None) -> Tensor:
        return dropout_add_layer_norm(
            branch, total, ones, None, epsilon, dropout_p=dropout_p, keep_mask=mask,
            residual_in_fp32=residual_in_fp32, compute_dtype=compute_dtype,
        )[1]  # fmt: skip

    total = residual if x1 is None else add(x1, keep_mask1, residual)
    x = add(x0, keep_mask0, total)
    results = []
    for weight, bias in ((weight0, bias0), (weight1, bias1)):
        if weight is not None:
            z, _ = dropout_add_layer_norm(
                x, None, weight, bias, epsilon, is_rms_norm=is_rms_norm,
                zero_centered_weight=zero_centered_weight, compute_dtype=compute_dtype,
            )  # fmt: skip
            results.append(z.to(compute_dtype or x0.dtype))
    return [*results, x]
