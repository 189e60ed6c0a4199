"""What each op computes, in plain torch: the definition that the kernels are tested against.

Differentiable, on any device, and without any attempt to be fast. `compute_dtype` selects between

  None           the expression as one writes it in torch, in the dtypes given: the baseline of the
                 same low precision;
  torch.float64  every input is cast first: the exact answer. Gradients come in the inputs' dtypes
                 unless the inputs are float64 already.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dropout_mask(rng_state: Tensor, rows: int, cols: int, dropout_p: float) -> Tensor:
    """The mask [rows, cols] (uint8, 1 = kept) of Philox-4x32-10 (Salmon et al., SC11).

    key = seed; counter = {col // 4, row, offset low, offset high}, with the high half of row added
    to the last word; element = word col % 4; kept where word >= floor(dropout_p * 2**32).
    """
    mask32 = 0xFFFFFFFF
    seed, offset = (int(v) for v in rng_state.tolist())
    groups = (cols + 3) // 4
    row = torch.arange(rows, dtype=torch.int64)[:, None].expand(rows, groups)
    c0 = torch.arange(groups, dtype=torch.int64)[None, :].expand(rows, groups)
    c1, c2 = row & mask32, torch.full_like(row, offset & mask32)
    c3 = ((row >> 32) + (offset >> 32)) & mask32
    key0, key1 = seed & mask32, (seed >> 32) & mask32
    for _ in range(10):
        # int64 products wrap like uint64 ones; the masks make the shifts logical.
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            ((product1 >> 32) & mask32) ^ c1 ^ key0,
            product1 & mask32,
            ((product0 >> 32) & mask32) ^ c3 ^ key1,
            product0 & mask32,
        )
        key0, key1 = (key0 + 0x9E3779B9) & mask32, (key1 + 0xBB67AE85) & mask32
    words = torch.stack([c0, c1, c2, c3], dim=-1).reshape(rows, groups * 4)[:, :cols]
    threshold = int(torch.tensor(dropout_p, dtype=torch.float32).item() * 2**32)
    return (words >= threshold).to(torch.uint8).to(rng_state.device)


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
