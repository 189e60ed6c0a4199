"""layer_norm_fn and rms_norm_fn of flashtrain.ops.layer_norm, where they are public."""

from __future__ import annotations

import torch
from torch import Tensor

from flashtrain.ops._arguments import check_written, checked, overlap
from flashtrain.ops.layer_norm import calls
from flashtrain.ops.layer_norm.calls import NormOptions


def _write_into(name: str, buffer: Tensor | None, value: Tensor) -> Tensor:
    """The value, in the caller's buffer where there is one."""
    if buffer is None:
        return value
    if buffer.shape != value.shape or buffer.dtype != value.dtype:
        raise ValueError(
            f"{name}: got {buffer.dtype} {list(buffer.shape)}; supported: {value.dtype} "
            f"{list(value.shape)}"
        )
    if buffer.device != value.device:
        raise ValueError(f"{name}: is on {buffer.device}; supported: x's device, {value.device}")
    if buffer.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: requires grad; supported: a tensor that does not")
    check_written(name, buffer)
    return buffer.copy_(value)


@checked
def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Tensor | tuple[Tensor | None, ...]:
    """LayerNorm of dropout(rowscale * x) + dropout(x1) + residual, and a second one with weight1.

    Args:
      x: [..., D], float32, float16 or bfloat16.
      weight, weight1: [D], float32 or x's dtype; weight1 None: one result.
      bias, bias1: [D], their weight's dtype.
      residual: like x, in float32 or x's dtype.
      x1: like x, a second branch. Not together with rowscale.
      eps: added to the variance (RMSNorm: the mean square).
      dropout_p: probability in [0, 1) of zeroing an element.
      rowscale: [...], a factor for each row, without gradient.
      prenorm: also return the sum.
      residual_in_fp32: without a residual, the sum is kept in float32.
      zero_centered_weight: scale by 1 + weight.
      is_rms_norm: divide by the root mean square, without subtracting the mean.
      return_dropout_mask: also return the masks of x and x1, bool, True = kept; None where nothing
        is dropped.
      out_dtype: of the results; None: out's, or else x's.
      out: a buffer for the first result, which is copied there; None: a new tensor.
      residual_out: a buffer for the sum, likewise; in the residual's dtype.

    Returns y, or the tuple (y[, y1][, sum][, mask, mask1]). With x1 or weight1, composed of the
    fused op and torch's, see `dropout_add_layer_norm_parallel_residual`.

    Raises:
      ValueError: an argument does not fit; its name, what came, what is supported.
    """
    if out is not None and out_dtype is None:
        out_dtype = out.dtype
    options = NormOptions(eps, is_rms_norm, zero_centered_weight, out_dtype, "x", "eps")
    y1, mask1 = None, None
    if x1 is None and weight1 is None and bias1 is None:
        y, total, mask = calls.dropout_add_norm(
            x, residual, weight, bias, dropout_p, options, rowscale,
            residual_in_fp32=residual_in_fp32, with_mask=return_dropout_mask,
        )  # fmt: skip
    else:
        y, y1, total, mask, mask1 = calls.dropout_add_norm_parallel(
            x, x1, residual, weight, bias, weight1, bias1, dropout_p, options,
            residual_in_fp32, return_dropout_mask, rowscale,
        )  # fmt: skip
    if total is x and not (out is residual_out is None):
        total = total.clone()  # the buffers may be x's memory
    if out is not None and residual_out is not None and overlap(out, residual_out):
        raise ValueError("residual_out: shares memory with out; supported: memory of its own")
    results: list[Tensor | None] = [_write_into("out", out, y)]
    if weight1 is not None:
        results.append(y1)
    total = _write_into("residual_out", residual_out, total)
    if prenorm:
        results.append(total)
    if return_dropout_mask:
        results += [None if mask is None else mask.bool(), mask1]
    return tuple(results) if len(results) > 1 else results[0]


@checked
def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Tensor | tuple[Tensor | None, ...]:
    """`layer_norm_fn` with is_rms_norm=True."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm,
        residual_in_fp32, zero_centered_weight, True, return_dropout_mask, out_dtype, out,
        residual_out,
    )  # fmt: skip
