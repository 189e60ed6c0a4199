"""Fused dropout + add + LayerNorm / RMSNorm, forward and backward, on CPU and CUDA.

    x = layerscale * dropout(rowscale * x0) + residual
    z = norm(x) * weight + bias

The public functions have the names and arguments of `flash_attn.ops.layer_norm`,
`flash_attn.ops.rms_norm` and `flash_attn.ops.triton.layer_norm`. docs/layer_norm.md has numerics,
cost and errors.

Dtypes: x0 float32, float16 or bfloat16; residual, and with it x, float32 or x0's; weight, bias and
layerscale all float32 or all x0's; rowscale float32 or x0's. z has x0's dtype. All arithmetic is
float32. `torch.autocast` changes nothing here: mixed dtypes are this op's normal input, and casts
would only add passes over memory.

D is the hidden size; the leading dimensions count as rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashtrain.ops._arguments import checked
from flashtrain.ops.layer_norm import calls
from flashtrain.ops.layer_norm.calls import NormOptions
from flashtrain.ops.layer_norm.fn import layer_norm_fn, rms_norm_fn
from flashtrain.ops.layer_norm.modules import (
    DropoutAddLayerNorm,
    DropoutAddLayerNormParallelResidual,
    DropoutAddRMSNorm,
    DropoutAddRMSNormParallelResidual,
    RMSNorm,
)
from flashtrain.ops.layer_norm.subset import dropout_add_norm_subset

__all__ = [
    "DropoutAddLayerNorm",
    "DropoutAddLayerNormParallelResidual",
    "DropoutAddRMSNorm",
    "DropoutAddRMSNormParallelResidual",
    "RMSNorm",
    "dropout_add_layer_norm",
    "dropout_add_layer_norm_parallel_residual",
    "dropout_add_layer_norm_subset",
    "dropout_add_rms_norm",
    "dropout_add_rms_norm_parallel_residual",
    "dropout_add_rms_norm_subset",
    "layer_norm",
    "layer_norm_fn",
    "rms_norm",
    "rms_norm_fn",
]


def _dropout_add_norm(
    x0, residual, weight, bias, dropout_p, epsilon, rowscale, layerscale, prenorm,
    residual_in_fp32, return_dropout_mask, *, is_rms_norm: bool,
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    z, x, mask = calls.dropout_add_norm(
        x0, residual, weight, bias, dropout_p, NormOptions(epsilon, is_rms_norm), rowscale,
        layerscale, residual_in_fp32, return_dropout_mask,
    )  # fmt: skip
    if not prenorm and not return_dropout_mask:
        return z
    if not return_dropout_mask:
        return z, x
    mask = calls.all_ones_mask(x0) if mask is None else mask
    return (z, x, mask) if prenorm else (z, mask)


def _dropout_add_norm_subset(
    x0, residual, weight, bias, dropout_p, epsilon, layerscale, x0_subset, out_subset,
    rowscale_const, out_numrows, prenorm, residual_in_fp32, return_dropout_mask, *,
    is_rms_norm: bool,
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    z, x, mask = dropout_add_norm_subset(
        x0, residual, weight, bias, dropout_p, NormOptions(epsilon, is_rms_norm), layerscale,
        x0_subset, out_subset, rowscale_const, out_numrows, residual_in_fp32,
    )  # fmt: skip
    results = [z.reshape(_regrouped("out_subset", z, x0))]
    if prenorm:
        results.append(x.reshape(_regrouped("x0_subset", x, x0)))
    if return_dropout_mask:
        results.append(calls.all_ones_mask(x0) if mask is None else mask.to(torch.uint8))
    return tuple(results) if len(results) > 1 else results[0]


def _regrouped(name: str, rows: Tensor, x0: Tensor) -> tuple[int, ...]:
    """The shape of [rows, D] with the dimensions of x0 but for the first."""
    inner = x0.shape[1:-1].numel()
    if inner == 0 or rows.shape[0] % inner != 0:
        raise ValueError(
            f"{name}: gives {rows.shape[0]} rows; supported: a multiple of {inner}, so that they "
            f"can take the shape of x0, {list(x0.shape)}, but for its first dimension"
        )
    return (rows.shape[0] // inner, *x0.shape[1:])


def _dropout_add_norm_parallel(
    x0, x1, residual, weight0, bias0, weight1, bias1, dropout_p, epsilon, prenorm,
    residual_in_fp32, return_dropout_mask, *, is_rms_norm: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    z0, z1, x, mask0, mask1 = calls.dropout_add_norm_parallel(
        x0, x1, residual, weight0, bias0, weight1, bias1, dropout_p,
        NormOptions(epsilon, is_rms_norm, suffix="0"), residual_in_fp32, return_dropout_mask,
    )  # fmt: skip
    results = [z0, z1, x] if prenorm else [z0, z1]
    if return_dropout_mask:
        masks = (mask0, mask1)
        results += [calls.all_ones_mask(x0) if m is None else m.to(torch.uint8) for m in masks]
    return tuple(results)


# --- Public functions -----------------------------------------------------------------------------


@checked
def dropout_add_layer_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """z = LayerNorm(x) * weight + bias of x = layerscale * dropout(rowscale * x0) + residual.

    Args:
      x0: [..., D], float32, float16 or bfloat16; the output of the sublayer before.
      residual: like x0, in float32 or x0's dtype; None: nothing is added.
      weight: [D], float32 or x0's dtype.
      bias: [D], weight's dtype; None: no bias.
      dropout_p: probability in [0, 1) of zeroing an element; survivors are scaled by 1 / (1 - p).
        The caller passes 0 in evaluation.
      epsilon: added to the (biased) variance.
      rowscale: [...], a factor for each row, before dropout (stochastic depth). Without gradient.
      layerscale: [D], weight's dtype, a factor for each column, after dropout.
      prenorm: also return x, the residual stream, in the residual's dtype.
      residual_in_fp32: without a residual, x is kept in float32 (with one, its dtype decides).
      return_dropout_mask: also return the mask, uint8 like x0, 1 = kept.

    Returns z, or the tuple (z[, x][, mask]); z has x0's shape and dtype.

    Any strides are taken: rows that are strided are read as they are, all else is copied. Saved for
    backward: x, weight, mean and rstd (float32 [...]), the scales, two integers in place of the
    mask, and x0 where layerscale needs a gradient. Only gradients that are required are computed.

    Raises:
      ValueError: an argument does not fit; its name, what came, what is supported.
      RuntimeError: the device reported an error.
    """
    return _dropout_add_norm(
        x0, residual, weight, bias, dropout_p, epsilon, rowscale, layerscale, prenorm,
        residual_in_fp32, return_dropout_mask, is_rms_norm=False,
    )  # fmt: skip


@checked
def dropout_add_rms_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`dropout_add_layer_norm` with z = x / sqrt(mean(x^2) + epsilon) * weight + bias."""
    return _dropout_add_norm(
        x0, residual, weight, bias, dropout_p, epsilon, rowscale, layerscale, prenorm,
        residual_in_fp32, return_dropout_mask, is_rms_norm=True,
    )  # fmt: skip


@checked
def dropout_add_layer_norm_subset(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    layerscale: Tensor | None = None,
    x0_subset: Tensor | None = None,
    out_subset: Tensor | None = None,
    rowscale_const: float = 1.0,
    out_numrows: int = 0,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`dropout_add_layer_norm` with x0 for some rows of x, and z of some rows (stochastic depth).

    Row r of x is layerscale * dropout(rowscale_const * x0[x0_subset[r] - 1]) + residual[r], or
    residual[r] alone where x0_subset[r] is 0; its norm is z[out_subset[r] - 1], or not computed
    where out_subset[r] is 0.

    Args:
      x0: [n, ..., D].
      residual: [..., D] of R rows; None: zeros.
      x0_subset: R numbers, int32 or int64, each of 1 to the rows of x0 at most once, or 0. None: x0
        has all rows. A row of x0 that is not named has gradient 0.
      out_subset: R numbers that name each of 1 to out_numrows once, or 0. None: z has all rows.
      rowscale_const: a factor for x0, 1 / (1 - drop rate).
      out_numrows: the rows of z; read where out_subset is given.

    The others as in `dropout_add_layer_norm`. Returns z, or (z[, x][, mask]): z and x of shape
    [m, ..., D] with the inner dimensions of x0, the mask of x0's shape.

    Composed of torch's dropout and indexed copies, and of the fused norm for the rows that z has.
    Rows without z have no part in the gradients of weight and bias.

    Raises:
      ValueError: as `dropout_add_layer_norm`; on the CPU also for a number out of range or twice.
        On CUDA the numbers are not read: one out of range counts as 0, of two equal ones one wins.
    """
    return _dropout_add_norm_subset(
        x0, residual, weight, bias, dropout_p, epsilon, layerscale, x0_subset, out_subset,
        rowscale_const, out_numrows, prenorm, residual_in_fp32, return_dropout_mask,
        is_rms_norm=False,
    )  # fmt: skip


@checked
def dropout_add_rms_norm_subset(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    layerscale: Tensor | None = None,
    x0_subset: Tensor | None = None,
    out_subset: Tensor | None = None,
    rowscale_const: float = 1.0,
    out_numrows: int = 0,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`dropout_add_layer_norm_subset` with RMSNorm."""
    return _dropout_add_norm_subset(
        x0, residual, weight, bias, dropout_p, epsilon, layerscale, x0_subset, out_subset,
        rowscale_const, out_numrows, prenorm, residual_in_fp32, return_dropout_mask,
        is_rms_norm=True,
    )  # fmt: skip


@checked
def dropout_add_layer_norm_parallel_residual(
    x0: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    weight0: Tensor,
    bias0: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    dropout_p: float,
    epsilon: float,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> tuple[Tensor | None, ...]:
    """x = dropout(x0) + dropout(x1) + residual; z0 = norm(x) * weight0 + bias0, z1 with weight1.

    For blocks whose attention and MLP run side by side (GPT-J, GPT-NeoX).

    Args:
      x0, x1: [..., D] in one dtype; x1 None: no second branch.
      weight0, bias0, weight1, bias1: [D]; weight1 None: the norm is tied, z1 is None.

    The others as in `dropout_add_layer_norm`. Returns (z0, z1[, x][, mask0, mask1]); the masks are
    uint8 like x0. Composed of the fused op and a second norm: 1.5 times the bytes of one kernel in
    forward, twice in backward.
    """
    return _dropout_add_norm_parallel(
        x0, x1, residual, weight0, bias0, weight1, bias1, dropout_p, epsilon, prenorm,
        residual_in_fp32, return_dropout_mask, is_rms_norm=False,
    )  # fmt: skip


@checked
def dropout_add_rms_norm_parallel_residual(
    x0: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    weight0: Tensor,
    bias0: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    dropout_p: float,
    epsilon: float,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> tuple[Tensor | None, ...]:
    """`dropout_add_layer_norm_parallel_residual` with RMSNorm."""
    return _dropout_add_norm_parallel(
        x0, x1, residual, weight0, bias0, weight1, bias1, dropout_p, epsilon, prenorm,
        residual_in_fp32, return_dropout_mask, is_rms_norm=True,
    )  # fmt: skip


@checked
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """LayerNorm(x) * weight + bias over the last dimension; as `dropout_add_layer_norm`."""
    options = NormOptions(epsilon, is_rms_norm=False, x0_name="x")
    return calls.dropout_add_norm(x, None, weight, bias, 0.0, options)[0]


@checked
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension; as `dropout_add_rms_norm`."""
    options = NormOptions(epsilon, is_rms_norm=True, x0_name="x")
    return calls.dropout_add_norm(x, None, weight, None, 0.0, options)[0]
