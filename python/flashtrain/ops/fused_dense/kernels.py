"""The torch.library ops under flashtrain.ops.fused_dense, and the autograd around them.

    fused_dense_forward          out, pre_act
    fused_dense_input_gradient   dx, dbias
    fused_dense_weight_gradient  dweight, dbias
    fused_dense_activation       activation(pre_act), where backward needs it once more

Tensors are [..., features]; the kernels take the leading dimensions as rows. An output that nobody
asked for has 0 elements. `fuse` false means the plain path, whatever is faster.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashtrain.ops._autograd import Function, once_differentiable
from flashtrain.ops._library import register
from flashtrain.ops.fused_dense import autotune, gemm
from flashtrain.ops.fused_dense.gemm import (
    FORWARD,
    IDENTITY,
    INPUT_GRADIENT,
    RELU,
    WEIGHT_GRADIENT,
    Operands,
    Product,
    Results,
)

# --- Kernels and fakes ----------------------------------------------------------------------------


def _rows(tensor: Tensor) -> Tensor:
    """[rows, features], contiguous."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1]).contiguous()


def _shaped(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A product's rows in the shape of the caller's tensor.

    Not a view, which autograd lets nobody write to where it comes out of an autograd.Function
    (rotary embeddings are applied in place to the projection of q, k and v).
    """
    return torch.ops.aten._unsafe_view(rows, shape)


def _compute(product: Product, operands: Operands, fuse: bool) -> Results:
    if torch.is_autocast_enabled(product.device.type):  # a backward pass inside of autocast
        with torch.autocast(product.device.type, enabled=False):
            return _compute(product, operands, fuse)
    if fuse and gemm.fits_library(product, operands):
        algorithm = autotune.choose(product, operands)
        if algorithm is not None:
            return gemm.run_fused(product, operands, algorithm)
    return gemm.run_plain(product, operands)


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty((0,))


def _forward_kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: int,
    save_pre_act: bool,
    fuse: bool,
) -> tuple[Tensor, Tensor]:
    rows, weight = _rows(x), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    product = Product(
        FORWARD,
        rows.shape[0],
        weight.shape[1],
        weight.shape[0],
        x.dtype,
        x.device,
        gemm.allows_tf32(x.dtype),
        activation,
        bias=bias is not None,
        pre_act=save_pre_act,
    )
    results = _compute(product, Operands(rows, weight, bias), fuse)
    shape = (*x.shape[:-1], weight.shape[0])
    pre_act = _nothing(x) if results.pre_act is None else _shaped(results.pre_act, shape)
    return _shaped(results.out, shape), pre_act


def _forward_fake(x, weight, bias, activation, save_pre_act, fuse):
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return out, torch.empty_like(out) if save_pre_act else _nothing(x)


def _input_gradient_kernel(
    dout: Tensor,
    weight: Tensor,
    pre_act: Tensor | None,
    activation: int,
    dresidual: Tensor | None,
    need_bias: bool,
    fuse: bool,
) -> tuple[Tensor, Tensor]:
    rows, weight = _rows(dout), weight.contiguous()
    shape = (*dout.shape[:-1], weight.shape[1])
    if dresidual is not None:
        dx = torch.addmm(_rows(dresidual), rows, weight)
        return _shaped(dx, shape), _nothing(dout)
    product = Product(
        INPUT_GRADIENT,
        rows.shape[0],
        weight.shape[1],
        weight.shape[0],
        dout.dtype,
        dout.device,
        gemm.allows_tf32(dout.dtype),
        activation,
        dbias=need_bias,
    )
    pre_rows = None if pre_act is None else _rows(pre_act)
    results = _compute(product, Operands(rows, weight, None, pre_rows), fuse)
    dbias = _nothing(dout) if results.dbias is None else results.dbias
    return _shaped(results.out, shape), dbias


def _input_gradient_fake(dout, weight, pre_act, activation, dresidual, need_bias, fuse):
    dx = dout.new_empty((*dout.shape[:-1], weight.shape[1]))
    return dx, dout.new_empty((weight.shape[1] if need_bias else 0,))


def _weight_gradient_kernel(
    dout: Tensor, x: Tensor, output_mask: list[bool], fuse: bool
) -> tuple[Tensor, Tensor]:
    need_weight, need_bias = output_mask
    rows, x_rows = _rows(dout), _rows(x)
    if not need_weight:
        dbias = gemm.activate_backward_(rows, None, IDENTITY, need_bias)
        return _nothing(dout), _nothing(dout) if dbias is None else dbias
    product = Product(
        WEIGHT_GRADIENT,
        rows.shape[0],
        x_rows.shape[1],
        rows.shape[1],
        dout.dtype,
        dout.device,
        gemm.allows_tf32(dout.dtype),
        dbias=need_bias,
    )
    results = _compute(product, Operands(rows, x_rows), fuse)
    return results.out, _nothing(dout) if results.dbias is None else results.dbias


def _weight_gradient_fake(dout, x, output_mask, fuse):
    need_weight, need_bias = output_mask
    shape = (dout.shape[-1], x.shape[-1]) if need_weight else (0,)
    return dout.new_empty(shape), dout.new_empty((dout.shape[-1] if need_bias else 0,))


def _activation_kernel(pre_act: Tensor, activation: int) -> Tensor:
    return gemm.activate(pre_act.contiguous(), None, activation, None)


def _activation_fake(pre_act, activation):
    return torch.empty_like(pre_act, memory_format=torch.contiguous_format)


# --- Schemas --------------------------------------------------------------------------------------

fused_dense_forward = register(
    "fused_dense_forward(Tensor x, Tensor weight, Tensor? bias, int activation, "
    "bool save_pre_act, bool fuse) -> (Tensor out, Tensor pre_act)",
    _forward_kernel,
    _forward_fake,
)
fused_dense_input_gradient = register(
    "fused_dense_input_gradient(Tensor dout, Tensor weight, Tensor? pre_act, int activation, "
    "Tensor? dresidual, bool need_bias, bool fuse) -> (Tensor dx, Tensor dbias)",
    _input_gradient_kernel,
    _input_gradient_fake,
)
fused_dense_weight_gradient = register(
    "fused_dense_weight_gradient(Tensor dout, Tensor x, bool[2] output_mask, bool fuse) "
    "-> (Tensor dweight, Tensor dbias)",
    _weight_gradient_kernel,
    _weight_gradient_fake,
)
fused_dense_activation = register(
    "fused_dense_activation(Tensor pre_act, int activation) -> Tensor",
    _activation_kernel,
    _activation_fake,
)


# --- Autograd -------------------------------------------------------------------------------------


def _weight_and_bias_gradients(
    dout: Tensor, x: Tensor | None, need_weight: bool, need_bias: bool, fuse: bool
) -> tuple[Tensor | None, Tensor | None]:
    if not (need_weight or need_bias):
        return None, None
    dweight, dbias = fused_dense_weight_gradient(
        dout, dout if x is None else x, [need_weight, need_bias], fuse
    )
    return dweight if need_weight else None, dbias if need_bias else None


class Dense(Function):
    """x weight^T + bias, and x itself where its gradient is to be added here. Saves x and weight,
    each only if the other's gradient is wanted."""

    @staticmethod
    def forward(ctx, x, weight, bias, return_residual, fuse):
        need_x, need_weight = ctx.needs_input_grad[:2]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None)
        ctx.fuse = fuse
        out, _ = fused_dense_forward(x, weight, bias, IDENTITY, False, fuse)
        return (out, x.view_as(x)) if return_residual else (out, None)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dresidual):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        if dout is None:
            return dresidual, None, None, None, None
        dx = None
        if need_x:
            dx, _ = fused_dense_input_gradient(
                dout, weight, None, IDENTITY, dresidual, False, ctx.fuse
            )
        dweight, dbias = _weight_and_bias_gradients(dout, x, need_weight, need_bias, ctx.fuse)
        return dx, dweight, dbias, None, None


# The tensors that an MLP saves for backward, except x and the weights.
KEEP_ALL, KEEP_PRE_ACT, KEEP_NOTHING = 0, 1, 2


class Mlp(Function):
    """activation(x weight1^T + bias1) weight2^T + bias2, and x itself where its gradient is to be
    added here. ReLU is its own pre_act, of the same sign: it keeps the activation alone."""

    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2, activation, keep, return_residual, fuse):
        need_x, need_weight1, need_bias1, need_weight2, _ = ctx.needs_input_grad[:5]
        need_pre_act = need_x or need_weight1 or need_bias1
        recompute = keep == KEEP_NOTHING and (need_pre_act or need_weight2)
        save_pre_act = (
            activation != RELU
            and not recompute
            and (need_pre_act or (need_weight2 and keep == KEEP_PRE_ACT))
        )
        act, pre_act = fused_dense_forward(x, weight1, bias1, activation, save_pre_act, fuse)
        out, _ = fused_dense_forward(act, weight2, bias2, IDENTITY, False, fuse)
        keep_act = not recompute and (
            (need_pre_act or need_weight2)
            if activation == RELU
            else need_weight2 and keep == KEEP_ALL
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x if need_weight1 or recompute else None,
            weight1 if need_x or recompute else None,
            bias1 if recompute else None,
            weight2 if need_pre_act else None,
            pre_act if save_pre_act else None,
            act if keep_act else None,
        )
        ctx.options = (activation, recompute, fuse)
        return (out, x.view_as(x)) if return_residual else (out, None)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dresidual):
        if dout is None:
            return dresidual, *[None] * 8
        x, weight1, bias1, weight2, pre_act, act = ctx.saved_tensors
        activation, recompute, fuse = ctx.options
        need_x, need_weight1, need_bias1, need_weight2, need_bias2 = ctx.needs_input_grad[:5]
        if recompute:
            act, pre_act = fused_dense_forward(
                x, weight1, bias1, activation, activation != RELU, fuse
            )
        elif act is None and need_weight2:
            act = fused_dense_activation(pre_act, activation)
        dweight2, dbias2 = _weight_and_bias_gradients(dout, act, need_weight2, need_bias2, fuse)
        dx = dweight1 = dbias1 = None
        if need_x or need_weight1 or need_bias1:
            dpre_act, dbias1 = fused_dense_input_gradient(
                dout,
                weight2,
                act if activation == RELU else pre_act,
                activation,
                None,
                need_bias1,
                fuse,
            )
            dweight1, _ = _weight_and_bias_gradients(dpre_act, x, need_weight1, False, fuse)
            if need_x:
                dx, _ = fused_dense_input_gradient(
                    dpre_act, weight1, None, IDENTITY, dresidual, False, fuse
                )
        return dx, dweight1, dbias1 if need_bias1 else None, dweight2, dbias2, *[None] * 4
