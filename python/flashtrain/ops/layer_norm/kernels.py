"""The torch.library ops under flashtrain.ops.layer_norm, and the autograd around them.

Three forwards rather than one with flags: the plain norm writes no x (its input is x), and the mask
is an output of its own. Tensors are [..., D]; the extension takes the leading dimensions as rows,
which spares autograd the nodes, and every call the 8 us, of flattening and unflattening.

    layer_norm_forward                  z, mean, rstd
    dropout_add_layer_norm_forward      z, x, mean, rstd
    dropout_add_layer_norm_mask_forward z, x, mean, rstd, mask
    layer_norm_backward                 dx0, dresidual, dweight, dbias, dlayerscale

An output that does not apply (the mean of RMSNorm, a gradient nobody asked for) has 0 elements.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashtrain import _kernels
from flashtrain.ops._autograd import Function, once_differentiable
from flashtrain.ops._library import as_rows, eager, launch_context, register, to_kernel

# --- Kernels and fakes ----------------------------------------------------------------------------


def _rows(tensor: Tensor | None) -> object:
    return None if tensor is None else to_kernel(as_rows(tensor))


def _vector(tensor: Tensor | None) -> object:
    return None if tensor is None else to_kernel(tensor.contiguous())


def _run_forward(
    x: Tensor | None,
    mask: Tensor | None,
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    rowscale: Tensor | None,
    layerscale: Tensor | None,
    rng_state: Tensor | None,
    dropout_p: float,
    epsilon: float,
    is_rms_norm: bool,
    zero_centered_weight: bool,
    z_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills x and mask where they are wanted; returns (z, mean, rstd)."""
    z, mean, rstd = _forward_outputs(x0, is_rms_norm, z_dtype)
    _kernels.layer_norm_forward(
        _rows(x0),
        _rows(residual),
        _vector(weight),
        _vector(bias),
        _vector(rowscale),
        _vector(layerscale),
        _vector(rng_state),
        dropout_p,
        epsilon,
        is_rms_norm,
        zero_centered_weight,
        to_kernel(z),
        _rows(x),
        None if is_rms_norm else to_kernel(mean),
        to_kernel(rstd),
        _rows(mask),
        launch_context(x0),
    )
    return z, mean, rstd


def _empty_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def _forward_outputs(
    x0: Tensor, is_rms_norm: bool, z_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    rstd = x0.new_empty(x0.shape[:-1], dtype=torch.float32)
    mean = x0.new_empty((0,), dtype=torch.float32) if is_rms_norm else torch.empty_like(rstd)
    return _empty_like(x0, z_dtype), mean, rstd


def _norm_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any):
    return _run_forward(None, None, x, None, weight, bias, None, None, None, 0.0, *options)


def _norm_fake(x, weight, bias, epsilon, is_rms_norm, zero_centered_weight, z_dtype):
    return _forward_outputs(x, is_rms_norm, z_dtype)


def _add_norm_kernel(x0: Tensor, *args: Any):
    *inputs, x_dtype = args
    x = _empty_like(x0, x_dtype)
    z, mean, rstd = _run_forward(x, None, x0, *inputs)
    return z, x, mean, rstd


def _add_norm_fake(x0: Tensor, *args: Any):
    *_, is_rms_norm, _, z_dtype, x_dtype = args
    z, mean, rstd = _forward_outputs(x0, is_rms_norm, z_dtype)
    return z, _empty_like(x0, x_dtype), mean, rstd


def _add_norm_mask_kernel(x0: Tensor, *args: Any):
    *inputs, x_dtype = args
    x = _empty_like(x0, x_dtype)
    mask = _empty_like(x0, torch.uint8)
    z, mean, rstd = _run_forward(x, mask, x0, *inputs)
    return z, x, mean, rstd, mask


def _add_norm_mask_fake(x0: Tensor, *args: Any):
    return (*_add_norm_fake(x0, *args), _empty_like(x0, torch.uint8))


def _backward_outputs(
    x: Tensor, weight: Tensor, x0_dtype: torch.dtype, output_mask: list[bool]
) -> tuple[Tensor, ...]:
    """dx0, dresidual, dweight, dbias, dlayerscale."""
    likes = ((x, x0_dtype), (x, x.dtype), *(((weight, weight.dtype),) * 3))
    return tuple(
        _empty_like(like, dtype) if wanted else torch.empty(0, dtype=dtype, device=like.device)
        for (like, dtype), wanted in zip(likes, output_mask)
    )


def _backward_kernel(
    dz: Tensor,
    dx: Tensor | None,
    x: Tensor,
    x0: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor,
    rowscale: Tensor | None,
    layerscale: Tensor | None,
    rng_state: Tensor | None,
    dropout_p: float,
    is_rms_norm: bool,
    zero_centered_weight: bool,
    x0_dtype: torch.dtype,
    output_mask: list[bool],
):
    outputs = _backward_outputs(x, weight, x0_dtype, output_mask)
    dx0, dresidual, dweight, dbias, dlayerscale = (
        to_kernel(out) if wanted else None for out, wanted in zip(outputs, output_mask)
    )
    _kernels.layer_norm_backward(
        _rows(dz),
        _rows(dx),
        _rows(x),
        _rows(x0),
        _vector(mean),
        to_kernel(rstd),
        _vector(weight),
        _vector(rowscale),
        _vector(layerscale),
        _vector(rng_state),
        dropout_p,
        is_rms_norm,
        zero_centered_weight,
        dx0,
        dresidual,
        dweight,
        dbias,
        dlayerscale,
        lambda size: to_kernel(x.new_empty((size,), dtype=torch.uint8)),
        launch_context(x),
    )
    return outputs


def _backward_fake(dz, dx, x, x0, mean, rstd, weight, *args):
    *_, x0_dtype, output_mask = args
    return _backward_outputs(x, weight, x0_dtype, output_mask)


# --- Schemas --------------------------------------------------------------------------------------

_ADD_NORM_ARGS = (
    "Tensor x0, Tensor? residual, Tensor weight, Tensor? bias, Tensor? rowscale, "
    "Tensor? layerscale, Tensor? rng_state, float dropout_p, float epsilon, bool is_rms_norm, "
    "bool zero_centered_weight, ScalarType z_dtype, ScalarType x_dtype"
)

layer_norm_forward = register(
    "layer_norm_forward(Tensor x, Tensor weight, Tensor? bias, float epsilon, bool is_rms_norm, "
    "bool zero_centered_weight, ScalarType z_dtype) -> (Tensor z, Tensor mean, Tensor rstd)",
    _norm_kernel,
    _norm_fake,
)
dropout_add_layer_norm_forward = register(
    f"dropout_add_layer_norm_forward({_ADD_NORM_ARGS}) "
    "-> (Tensor z, Tensor x, Tensor mean, Tensor rstd)",
    _add_norm_kernel,
    _add_norm_fake,
)
dropout_add_layer_norm_mask_forward = register(
    f"dropout_add_layer_norm_mask_forward({_ADD_NORM_ARGS}) "
    "-> (Tensor z, Tensor x, Tensor mean, Tensor rstd, Tensor mask)",
    _add_norm_mask_kernel,
    _add_norm_mask_fake,
)
layer_norm_backward = register(
    "layer_norm_backward(Tensor dz, Tensor? dx, Tensor x, Tensor? x0, Tensor? mean, Tensor rstd, "
    "Tensor weight, Tensor? rowscale, Tensor? layerscale, Tensor? rng_state, float dropout_p, "
    "bool is_rms_norm, bool zero_centered_weight, ScalarType x0_dtype, bool[5] output_mask) "
    "-> (Tensor dx0, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dlayerscale)",
    _backward_kernel,
    _backward_fake,
)


_norm = eager(layer_norm_forward, _norm_kernel)
_add_norm = eager(dropout_add_layer_norm_forward, _add_norm_kernel)
_add_norm_mask = eager(dropout_add_layer_norm_mask_forward, _add_norm_mask_kernel)
_backward = eager(layer_norm_backward, _backward_kernel)


# --- Autograd -------------------------------------------------------------------------------------


class Norm(Function):
    """z = norm(x). Saves x, weight, mean and rstd."""

    @staticmethod
    def forward(ctx, x, weight, bias, epsilon, is_rms_norm, zero_centered_weight, z_dtype):
        z, mean, rstd = _norm(x, weight, bias, epsilon, is_rms_norm, zero_centered_weight, z_dtype)
        ctx.save_for_backward(x, weight, None if is_rms_norm else mean, rstd)
        ctx.options = (is_rms_norm, zero_centered_weight)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, dz):
        x, weight, mean, rstd = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dx, _, dweight, dbias, _ = _backward(
            dz, None, x, None, mean, rstd, weight, None, None, None, 0.0, *ctx.options, x.dtype,
            [need_x, False, need_weight, need_bias, False],
        )  # fmt: skip
        return (
            dx if need_x else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
            *[None] * 4,
        )


class DropoutAddNorm(Function):
    """(z, x, mask). Saves x, weight, mean, rstd, the scales, rng_state; x0 only for dlayerscale."""

    @staticmethod
    def forward(
        ctx, x0, residual, weight, bias, rowscale, layerscale, rng_state, dropout_p, epsilon,
        is_rms_norm, zero_centered_weight, z_dtype, x_dtype, with_mask,
    ):  # fmt: skip
        args = (
            x0, residual, weight, bias, rowscale, layerscale, rng_state, dropout_p, epsilon,
            is_rms_norm, zero_centered_weight, z_dtype, x_dtype,
        )  # fmt: skip
        if with_mask:
            z, x, mean, rstd, mask = _add_norm_mask(*args)
            ctx.mark_non_differentiable(mask)
        else:
            z, x, mean, rstd = _add_norm(*args)
            mask = None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x,
            x0 if ctx.needs_input_grad[5] else None,
            weight,
            None if is_rms_norm else mean,
            rstd,
            rowscale,
            layerscale,
            rng_state,
        )
        ctx.options = (dropout_p, is_rms_norm, zero_centered_weight, x0.dtype)
        ctx.z_dtype = z_dtype
        return z, x, mask

    @staticmethod
    @once_differentiable
    def backward(ctx, dz, dx, _):
        x, x0, weight, mean, rstd, rowscale, layerscale, rng_state = ctx.saved_tensors
        x0_dtype = ctx.options[-1]
        need_x0, need_residual, need_weight, need_bias, _, need_layerscale = ctx.needs_input_grad[
            :6
        ]
        # Where x = x0 + residual in one dtype, the two have one gradient: written once.
        shared = (
            rng_state is None and rowscale is None and layerscale is None and x0_dtype == x.dtype
        )
        if dz is None:
            dz = x.new_zeros(x.shape, dtype=ctx.z_dtype)
        dx0, dresidual, dweight, dbias, dlayerscale = _backward(
            dz, dx, x, x0, mean, rstd, weight, rowscale, layerscale, rng_state, *ctx.options,
            [
                need_x0 or (shared and need_residual),
                need_residual and not shared,
                need_weight,
                need_bias,
                need_layerscale,
            ],
        )  # fmt: skip
        if shared:
            dresidual = dx0
        return (
            dx0 if need_x0 else None,
            dresidual if need_residual else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
            None,
            dlayerscale if need_layerscale else None,
            *[None] * 8,
        )


# --- With autograd where it is on, which spares the rest 8 us a call ------------------------------


def norm(*args: Any) -> Tensor:
    """z; the arguments are those of Norm.forward."""
    return Norm.apply(*args) if torch.is_grad_enabled() else _norm(*args)[0]


def dropout_add_norm(*args: Any, with_mask: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(z, x, mask); the arguments are those of DropoutAddNorm.forward."""
    if torch.is_grad_enabled():
        return DropoutAddNorm.apply(*args, with_mask)
    if with_mask:
        z, x, _, _, mask = _add_norm_mask(*args)
        return z, x, mask
    z, x, _, _ = _add_norm(*args)
    return z, x, None
