"""Fused dropout + add + LayerNorm / RMSNorm, forward and backward, on CPU and CUDA.

    residual_out = layerscale * dropout(rowscale * x0) + residual
    out = norm(residual_out) * weight + bias

The public functions have the names and arguments of `flash_attn.ops.layer_norm` and
`flash_attn.ops.rms_norm`; `flashtrain.compat.flash_attn` has its other forms. docs/layer_norm.md
has numerics, cost and errors.

Dtypes: x0 float32, float16 or bfloat16; residual, and with it residual_out, float32 or x0's;
weight, bias and layerscale all float32 or all x0's; rowscale float32 or x0's. out has x0's dtype.
All arithmetic is float32. `torch.autocast` changes nothing here: mixed dtypes are this op's normal
input, and casts would only add passes over memory.

D is the hidden size; the leading dimensions count as rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashtrain.ops._arguments import checked
from flashtrain.ops._autograd import Function, once_differentiable
from flashtrain.ops.layer_norm import kernels
from flashtrain.ops.layer_norm.checks import Checks, Names

__all__ = ["dropout_add_layer_norm", "dropout_add_rms_norm", "layer_norm", "rms_norm"]


class AddNorm(NamedTuple):
    out: Tensor
    residual_out: Tensor
    mask: Tensor | None  # uint8; None where it is not asked for, or nothing is dropped


_X0_NAMES, _X_NAMES = Names(), Names(x0="x")


# --- Autograd -------------------------------------------------------------------------------------


class _NormFunction(Function):
    """out = norm(x). Saves x, weight, mean and rstd."""

    @staticmethod
    def forward(ctx, x, weight, bias, epsilon, is_rms_norm, zero_centered_weight, out_dtype):
        out, mean, rstd = kernels.norm(
            x, weight, bias, epsilon, is_rms_norm, zero_centered_weight, out_dtype
        )
        ctx.save_for_backward(x, weight, None if is_rms_norm else mean, rstd)
        ctx.is_rms_norm, ctx.zero_centered_weight = is_rms_norm, zero_centered_weight
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, weight, mean, rstd = ctx.saved_tensors
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        dx, _, dweight, dbias, _ = kernels.backward(
            dout, None, x, None, mean, rstd, weight, None, None, None, 0.0, ctx.is_rms_norm,
            ctx.zero_centered_weight, x.dtype, [need_x, False, need_weight, need_bias, False],
        )  # fmt: skip
        return (
            dx if need_x else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
            None,
            None,
            None,
            None,
        )


class _AddNormFunction(Function):
    """AddNorm. Saves what was normalised, weight, mean, rstd, the scales and rng_state; x0 only for
    dlayerscale."""

    @staticmethod
    def forward(
        ctx, x0, residual, weight, bias, layerscale, rowscale, rng_state, options, with_mask
    ):
        inputs = (x0, residual, weight, bias, rowscale, layerscale, rng_state)
        if with_mask:
            out, residual_out, mean, rstd, mask = kernels.add_norm_mask(*inputs, *options)
            ctx.mark_non_differentiable(mask)
        else:
            out, residual_out, mean, rstd = kernels.add_norm(*inputs, *options)
            mask = None
        ctx.set_materialize_grads(False)
        needs = kernels.Gradients(*ctx.needs_input_grad[:5])
        ctx.save_for_backward(
            residual_out,
            x0 if needs.layerscale else None,
            None if options.is_rms_norm else mean,
            rstd,
            weight,
            rowscale,
            layerscale,
            rng_state,
        )
        ctx.options, ctx.x0_dtype = options, x0.dtype
        return out, residual_out, mask

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dresidual_out, _):
        x, x0, mean, rstd, weight, rowscale, layerscale, rng_state = ctx.saved_tensors
        options, needs = ctx.options, kernels.Gradients(*ctx.needs_input_grad[:5])
        # Where x = x0 + residual in one dtype, the two have one gradient: written once.
        shared = rng_state is rowscale is layerscale is None and ctx.x0_dtype == x.dtype
        if dout is None:
            dout = x.new_zeros(x.shape, dtype=options.out_dtype)
        wanted = needs
        if shared:
            wanted = needs._replace(x0=needs.x0 or needs.residual, residual=False)
        found = kernels.backward(
            dout, dresidual_out, x, x0, mean, rstd, weight, rowscale, layerscale, rng_state,
            options.dropout_p, options.is_rms_norm, options.zero_centered_weight, ctx.x0_dtype,
            list(wanted),
        )  # fmt: skip
        if shared:
            dx0, _, *others = found
            found = (dx0, dx0, *others)
        gradients = (grad if need else None for grad, need in zip(found, needs))
        return *gradients, None, None, None, None


# --- What is under all functions ------------------------------------------------------------------


def residual_dtype_of(x0: Tensor, residual: Tensor | None, residual_in_fp32: bool) -> torch.dtype:
    if residual is not None:
        return residual.dtype
    return torch.float32 if residual_in_fp32 else x0.dtype


def all_ones_mask(x0: Tensor) -> Tensor:
    return torch.ones_like(x0, dtype=torch.uint8, memory_format=torch.contiguous_format)


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    is_rms_norm: bool,
    zero_centered_weight: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """The norm alone, of arguments that have been checked."""
    if torch.is_grad_enabled():
        return _NormFunction.apply(
            x, weight, bias, epsilon, is_rms_norm, zero_centered_weight, out_dtype
        )
    # Without autograd's function a call takes 8 us less.
    return kernels.norm(x, weight, bias, epsilon, is_rms_norm, zero_centered_weight, out_dtype)[0]


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
    with_mask: bool = False,
    names: Names = _X0_NAMES,
) -> AddNorm:
    """The arguments are those of `dropout_add_layer_norm`, and

    is_rms_norm: divide by the root mean square, without subtracting the mean.
    zero_centered_weight: scale by 1 + weight.
    out_dtype: of out; None: x0's.
    names: of arguments, for errors.
    """
    checks = Checks(x0, dropout_p, epsilon, out_dtype, names)
    checks.columns(names.suffix, weight, bias=bias)
    if layerscale is not None:
        checks.columns("", weight, layerscale=layerscale)
    if residual is not None:
        checks.like("residual", residual, x0.shape)
    if rowscale is not None:
        checks.rowscale(rowscale)
    out_dtype = out_dtype or x0.dtype
    residual_dtype = residual_dtype_of(x0, residual, residual_in_fp32)
    rng_state = None
    if dropout_p > 0.0:
        # {seed, offset} on the op's device, from torch's own generator of it: manual_seed, CUDA
        # graphs, torch.compile and checkpointing treat it as any random number. A fake one for a
        # fake x0.
        rng_state = torch.randint_like(x0.new_empty(2, dtype=torch.int64), 2**62)
    elif residual is rowscale is layerscale is None and residual_dtype == x0.dtype:
        out = norm(x0, weight, bias, epsilon, is_rms_norm, zero_centered_weight, out_dtype)
        return AddNorm(out, x0, None)
    with_mask = with_mask and rng_state is not None
    options = kernels.Options(
        dropout_p, epsilon, is_rms_norm, zero_centered_weight, out_dtype, residual_dtype
    )
    if torch.is_grad_enabled():
        return AddNorm(
            *_AddNormFunction.apply(
                x0, residual, weight, bias, layerscale, rowscale, rng_state, options, with_mask
            )
        )
    inputs = (x0, residual, weight, bias, rowscale, layerscale, rng_state)
    if with_mask:
        out, residual_out, _, _, mask = kernels.add_norm_mask(*inputs, *options)
        return AddNorm(out, residual_out, mask)
    out, residual_out, _, _ = kernels.add_norm(*inputs, *options)
    return AddNorm(out, residual_out, None)


# --- Public functions -----------------------------------------------------------------------------


def _asked_for(
    result: AddNorm, x0: Tensor, prenorm: bool, return_dropout_mask: bool
) -> Tensor | tuple[Tensor, ...]:
    out, residual_out, mask = result
    if not return_dropout_mask:
        return (out, residual_out) if prenorm else out
    mask = all_ones_mask(x0) if mask is None else mask
    return (out, residual_out, mask) if prenorm else (out, mask)


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
    """out = LayerNorm(residual_out) * weight + bias; see the module for residual_out.

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
      prenorm: also return residual_out, the residual stream, in the residual's dtype.
      residual_in_fp32: without a residual, residual_out is float32 (with one, its dtype decides).
      return_dropout_mask: also return the mask, uint8 like x0, 1 = kept.

    Returns out, or the tuple (out[, residual_out][, mask]); out has x0's shape and dtype.

    Any strides are taken: rows that are strided are read as they are, all else is copied. Saved for
    backward: residual_out, weight, mean and rstd (float32 [...]), the scales, two integers in place
    of the mask, and x0 where layerscale needs a gradient. Only gradients that are required are
    computed.

    Raises:
      ValueError: an argument does not fit; its name, what came, what is supported.
      RuntimeError: the device reported an error.
    """
    result = add_norm(
        x0, residual, weight, bias, dropout_p, epsilon, rowscale=rowscale, layerscale=layerscale,
        residual_in_fp32=residual_in_fp32, with_mask=return_dropout_mask,
    )  # fmt: skip
    return _asked_for(result, x0, prenorm, return_dropout_mask)


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
    """`dropout_add_layer_norm` with out = x / sqrt(mean(x^2) + epsilon) * weight + bias."""
    result = add_norm(
        x0, residual, weight, bias, dropout_p, epsilon, rowscale=rowscale, layerscale=layerscale,
        is_rms_norm=True, residual_in_fp32=residual_in_fp32, with_mask=return_dropout_mask,
    )  # fmt: skip
    return _asked_for(result, x0, prenorm, return_dropout_mask)


@checked
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """LayerNorm(x) * weight + bias over the last dimension; as `dropout_add_layer_norm`."""
    return add_norm(x, None, weight, bias, 0.0, epsilon, names=_X_NAMES).out


@checked
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension; as `dropout_add_rms_norm`."""
    return add_norm(x, None, weight, None, 0.0, epsilon, is_rms_norm=True, names=_X_NAMES).out
