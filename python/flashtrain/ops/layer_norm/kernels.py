"""The torch.library ops of layer_norm: schema, fake, and the call of the extension.

Three forwards rather than one with flags: the plain norm writes no residual_out (its input is
that), and the mask is an output of its own. Tensors are [..., D]; the extension takes the leading
dimensions as rows, which spares autograd the nodes, and every call the 8 us, of flattening and
unflattening.

    layer_norm_forward                  out, mean, rstd
    dropout_add_layer_norm_forward      out, residual_out, mean, rstd
    dropout_add_layer_norm_mask_forward out, residual_out, mean, rstd, mask
    layer_norm_backward                 dx0, dresidual, dweight, dbias, dlayerscale

An output that does not apply (the mean of RMSNorm, a gradient nobody asked for) has 0 elements.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtrain import _kernels
from flashtrain.ops._library import as_rows, eager, launch_context, register, to_kernel


class Options(NamedTuple):
    """What the forward ops take after their tensors."""

    dropout_p: float
    epsilon: float
    is_rms_norm: bool
    zero_centered_weight: bool
    out_dtype: torch.dtype
    residual_dtype: torch.dtype  # of residual_out


class Gradients(NamedTuple):
    """Those that backward computes; in `wanted`, whether they are."""

    x0: Any
    residual: Any
    weight: Any
    bias: Any
    layerscale: Any


# --- Kernels and fakes ----------------------------------------------------------------------------


def _rows(tensor: Tensor | None) -> object:
    return None if tensor is None else to_kernel(as_rows(tensor))


def _vector(tensor: Tensor | None) -> object:
    return None if tensor is None else to_kernel(tensor.contiguous())


def _empty_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def _norm_outputs(
    x0: Tensor, is_rms_norm: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """out, mean, rstd."""
    rstd = x0.new_empty(x0.shape[:-1], dtype=torch.float32)
    mean = x0.new_empty((0,), dtype=torch.float32) if is_rms_norm else torch.empty_like(rstd)
    return _empty_like(x0, out_dtype), mean, rstd


def _run_forward(
    residual_out: Tensor | None,
    mask: Tensor | None,
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    rowscale: Tensor | None,
    layerscale: Tensor | None,
    rng_state: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills residual_out and mask where they are wanted; returns (out, mean, rstd)."""
    dropout_p, epsilon, is_rms_norm, zero_centered_weight, out_dtype, _ = options
    out, mean, rstd = _norm_outputs(x0, is_rms_norm, out_dtype)
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
        to_kernel(out),
        _rows(residual_out),
        None if is_rms_norm else to_kernel(mean),
        to_kernel(rstd),
        _rows(mask),
        launch_context(x0),
    )
    return out, mean, rstd


def _norm_kernel(x, weight, bias, epsilon, is_rms_norm, zero_centered_weight, out_dtype):
    options = Options(0.0, epsilon, is_rms_norm, zero_centered_weight, out_dtype, x.dtype)
    return _run_forward(None, None, x, None, weight, bias, None, None, None, options)


def _norm_fake(x, weight, bias, epsilon, is_rms_norm, zero_centered_weight, out_dtype):
    return _norm_outputs(x, is_rms_norm, out_dtype)


def _add_norm_kernel(x0, residual, weight, bias, rowscale, layerscale, rng_state, *args):
    options = Options(*args)
    residual_out = _empty_like(x0, options.residual_dtype)
    out, mean, rstd = _run_forward(
        residual_out, None, x0, residual, weight, bias, rowscale, layerscale, rng_state, options
    )
    return out, residual_out, mean, rstd


def _add_norm_fake(x0, residual, weight, bias, rowscale, layerscale, rng_state, *args):
    options = Options(*args)
    out, mean, rstd = _norm_outputs(x0, options.is_rms_norm, options.out_dtype)
    return out, _empty_like(x0, options.residual_dtype), mean, rstd


def _add_norm_mask_kernel(x0, residual, weight, bias, rowscale, layerscale, rng_state, *args):
    options = Options(*args)
    residual_out = _empty_like(x0, options.residual_dtype)
    mask = _empty_like(x0, torch.uint8)
    out, mean, rstd = _run_forward(
        residual_out, mask, x0, residual, weight, bias, rowscale, layerscale, rng_state, options
    )
    return out, residual_out, mean, rstd, mask


def _add_norm_mask_fake(x0, *args):
    return *_add_norm_fake(x0, *args), _empty_like(x0, torch.uint8)


def _gradient_outputs(
    x: Tensor, weight: Tensor, x0_dtype: torch.dtype, wanted: list[bool]
) -> tuple[Tensor, ...]:
    """Gradients."""
    likes = ((x, x0_dtype), (x, x.dtype), *(((weight, weight.dtype),) * 3))
    return tuple(
        _empty_like(like, dtype) if want else torch.empty(0, dtype=dtype, device=like.device)
        for (like, dtype), want in zip(likes, wanted)
    )


def _backward_kernel(
    dout: Tensor,
    dresidual_out: Tensor | None,
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
    wanted: list[bool],
):
    outputs = _gradient_outputs(x, weight, x0_dtype, wanted)
    dx0, dresidual, dweight, dbias, dlayerscale = (
        to_kernel(out) if want else None for out, want in zip(outputs, wanted)
    )
    _kernels.layer_norm_backward(
        _rows(dout),
        _rows(dresidual_out),
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


def _backward_fake(
    dout, dresidual_out, x, x0, mean, rstd, weight, rowscale, layerscale, rng_state, dropout_p,
    is_rms_norm, zero_centered_weight, x0_dtype, wanted,
):  # fmt: skip
    return _gradient_outputs(x, weight, x0_dtype, wanted)


# --- Schemas --------------------------------------------------------------------------------------

_FORWARD_ARGS = (
    "Tensor x0, Tensor? residual, Tensor weight, Tensor? bias, Tensor? rowscale, "
    "Tensor? layerscale, Tensor? rng_state, float dropout_p, float epsilon, bool is_rms_norm, "
    "bool zero_centered_weight, ScalarType out_dtype, ScalarType residual_dtype"
)

layer_norm_forward = register(
    "layer_norm_forward(Tensor x, Tensor weight, Tensor? bias, float epsilon, bool is_rms_norm, "
    "bool zero_centered_weight, ScalarType out_dtype) -> (Tensor out, Tensor mean, Tensor rstd)",
    _norm_kernel,
    _norm_fake,
)
dropout_add_layer_norm_forward = register(
    f"dropout_add_layer_norm_forward({_FORWARD_ARGS}) "
    "-> (Tensor out, Tensor residual_out, Tensor mean, Tensor rstd)",
    _add_norm_kernel,
    _add_norm_fake,
)
dropout_add_layer_norm_mask_forward = register(
    f"dropout_add_layer_norm_mask_forward({_FORWARD_ARGS}) "
    "-> (Tensor out, Tensor residual_out, Tensor mean, Tensor rstd, Tensor mask)",
    _add_norm_mask_kernel,
    _add_norm_mask_fake,
)
layer_norm_backward = register(
    "layer_norm_backward(Tensor dout, Tensor? dresidual_out, Tensor x, Tensor? x0, Tensor? mean, "
    "Tensor rstd, Tensor weight, Tensor? rowscale, Tensor? layerscale, Tensor? rng_state, "
    "float dropout_p, bool is_rms_norm, bool zero_centered_weight, ScalarType x0_dtype, "
    "bool[5] wanted) "
    "-> (Tensor dx0, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dlayerscale)",
    _backward_kernel,
    _backward_fake,
)


norm = eager(layer_norm_forward, _norm_kernel)
add_norm = eager(dropout_add_layer_norm_forward, _add_norm_kernel)
add_norm_mask = eager(dropout_add_layer_norm_mask_forward, _add_norm_mask_kernel)
backward = eager(layer_norm_backward, _backward_kernel)
