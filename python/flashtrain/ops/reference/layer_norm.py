"""Dropout + add + LayerNorm or RMSNorm in plain torch, with the signatures of the fused functions.

The models without fusion run on these. Beside the fused functions' arguments they have

  keep_mask      [..., cols], nonzero = kept; None: torch's dropout draws one.
  compute_dtype  see the package's docstring; results are then in it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    is_rms_norm: bool,
    zero_centered_weight: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    dtype = torch.promote_types(x.dtype, weight.dtype)
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if zero_centered_weight:
        weight = weight + 1.0
    if not is_rms_norm:
        return F.layer_norm(x, weight.shape, weight, bias, epsilon).to(out_dtype)
    out = F.rms_norm(x, weight.shape, weight, epsilon)
    return (out if bias is None else out + bias).to(out_dtype)


def _dropout(x: Tensor, dropout_p: float, keep_mask: Tensor | None) -> Tensor:
    if keep_mask is None:
        return F.dropout(x, dropout_p)
    return torch.where(keep_mask != 0, x / (1.0 - dropout_p), 0.0)


def _dtypes(
    x0: Tensor,
    residual: Tensor | None,
    residual_in_fp32: bool,
    out_dtype: torch.dtype | None,
    compute_dtype: torch.dtype | None,
) -> tuple[torch.dtype, torch.dtype]:
    """Of out and of residual_out."""
    if compute_dtype is not None:
        return compute_dtype, compute_dtype
    if residual is not None:
        return out_dtype or x0.dtype, residual.dtype
    fp32 = torch.promote_types(x0.dtype, torch.float32)
    return out_dtype or x0.dtype, fp32 if residual_in_fp32 else x0.dtype


def _cast(compute_dtype: torch.dtype | None, *tensors: Tensor | None) -> list:
    if compute_dtype is None:
        return list(tensors)
    return [None if t is None else t.to(compute_dtype) for t in tensors]


def add_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    *,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    is_rms_norm: bool = False,
    zero_centered_weight: bool = False,
    residual_in_fp32: bool = False,
    out_dtype: torch.dtype | None = None,
    keep_mask: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`flashtrain.ops.layer_norm.add_norm`: (out, residual_out, keep_mask)."""
    out_dtype, residual_dtype = _dtypes(x0, residual, residual_in_fp32, out_dtype, compute_dtype)
    x, residual, weight, bias, rowscale, layerscale = _cast(
        compute_dtype, x0, residual, weight, bias, rowscale, layerscale
    )
    if rowscale is not None:
        x = x * rowscale.unsqueeze(-1)
    x = _dropout(x, dropout_p, keep_mask)
    if layerscale is not None:
        x = x * layerscale
    x = (x if residual is None else x + residual).to(residual_dtype)
    out = _norm(x, weight, bias, epsilon, is_rms_norm, zero_centered_weight, out_dtype)
    return out, x, keep_mask


def parallel_add_norm(
    x0: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    weight0: Tensor,
    bias0: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    dropout_p: float,
    epsilon: float,
    *,
    is_rms_norm: bool = False,
    zero_centered_weight: bool = False,
    residual_in_fp32: bool = False,
    out_dtype: torch.dtype | None = None,
    keep_mask0: Tensor | None = None,
    keep_mask1: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """`flashtrain.ops.layer_norm.parallel.parallel_add_norm`, with a keep_mask for each branch."""
    out_dtype, residual_dtype = _dtypes(x0, residual, residual_in_fp32, out_dtype, compute_dtype)
    x, x1, residual, weight0, bias0, weight1, bias1 = _cast(
        compute_dtype, x0, x1, residual, weight0, bias0, weight1, bias1
    )
    x = _dropout(x, dropout_p, keep_mask0)
    if x1 is not None:
        x = x + _dropout(x1, dropout_p, keep_mask1)
    x = (x if residual is None else x + residual).to(residual_dtype)
    options = (epsilon, is_rms_norm, zero_centered_weight, out_dtype)
    out0 = _norm(x, weight0, bias0, *options)
    out1 = None if weight1 is None else _norm(x, weight1, bias1, *options)
    return out0, out1, x, keep_mask0, keep_mask1
