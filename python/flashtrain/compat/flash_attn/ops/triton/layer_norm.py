"""LayerNorm and RMSNorm with many options, and a norm with a dense layer after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flashtrain.ops._arguments import check_written, checked, overlap
from flashtrain.ops.fused_dense import fused_dense_func
from flashtrain.ops.layer_norm import add_norm
from flashtrain.ops.layer_norm.checks import Names
from flashtrain.ops.layer_norm.parallel import parallel_add_norm

__all__ = ["RMSNorm", "layer_norm_fn", "layer_norm_linear_fn", "rms_norm_fn"]

_NAMES = Names(x0="x", epsilon="eps")
_MODULE_NAMES = Names(x0="x")


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
    fused op and torch's, see `flashtrain.ops.layer_norm.parallel`.

    Raises:
      ValueError: an argument does not fit; its name, what came, what is supported.
    """
    if out is not None and out_dtype is None:
        out_dtype = out.dtype
    options: dict[str, Any] = {
        "rowscale": rowscale, "is_rms_norm": is_rms_norm, "out_dtype": out_dtype,
        "zero_centered_weight": zero_centered_weight, "residual_in_fp32": residual_in_fp32,
        "with_mask": return_dropout_mask, "names": _NAMES,
    }  # fmt: skip
    if x1 is None and weight1 is None and bias1 is None:
        y, total, mask = add_norm(x, residual, weight, bias, dropout_p, eps, **options)
        y1, mask1 = None, None
    else:
        y, y1, total, mask, mask1 = parallel_add_norm(
            x, x1, residual, weight, bias, weight1, bias1, dropout_p, eps, **options
        )
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
    hidden, residual_out = normed if prenorm else (normed, None)
    bias = None if linear_bias is None else linear_bias.to(hidden.dtype)
    out = fused_dense_func(hidden, linear_weight.to(hidden.dtype), bias)
    return (out, residual_out) if prenorm else out


class RMSNorm(nn.Module):
    """RMSNorm with parameter weight [hidden_size], after dropout and add where asked for.

    Args:
      hidden_size: D.
      eps: added to the mean square.
      dropout_p: dropout probability, used in training mode only.
      zero_centered_weight: scale by 1 + weight, with weight starting at 0, so that weight decay
        pulls the scale to 1.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.dropout_p = dropout_p
        self.zero_centered_weight = zero_centered_weight
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    @checked
    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        out, residual_out, _ = add_norm(
            x,
            residual,
            self.weight,
            None,
            self.dropout_p if self.training else 0.0,
            self.eps,
            is_rms_norm=True,
            zero_centered_weight=self.zero_centered_weight,
            residual_in_fp32=residual_in_fp32,
            names=_MODULE_NAMES,
        )
        return (out, residual_out) if prenorm else out

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, dropout_p={self.dropout_p}"
