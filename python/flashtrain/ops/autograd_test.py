"""torch.func's transforms, and second derivatives, of every op with an autograd.Function."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jacrev, vjp, vmap

from flashtrain.ops._autograd import Function, once_differentiable
from flashtrain.ops.attention import flash_attn_func
from flashtrain.ops.cross_entropy import cross_entropy_loss
from flashtrain.ops.fused_dense import fused_dense_func, fused_mlp_func
from flashtrain.ops.layer_norm import dropout_add_layer_norm, layer_norm, rms_norm
from flashtrain.ops.linear_cross_entropy import linear_cross_entropy

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

_LABELS = torch.tensor([2, 0, 4, 1])


def _add_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    z, total = dropout_add_layer_norm(x, 2 * x, weight, bias, 0.0, 1e-5, prenorm=True)
    return (z * total).sum()


def _add_norm_in_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    total = x + 2 * x
    return (F.layer_norm(total, total.shape[-1:], weight, bias, 1e-5) * total).sum()


def _attention(*qkv: Tensor) -> Tensor:
    q, k, v = (t.view(1, 4, 2, 4) for t in qkv)
    return flash_attn_func(q, k, v, causal=True).square().sum()


def _attention_in_torch(*qkv: Tensor) -> Tensor:
    q, k, v = (t.view(1, 4, 2, 4).transpose(1, 2) for t in qkv)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).square().sum()


def _dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out, residual = fused_dense_func(x, weight, bias, return_residual=True)
    return out.square().sum() + residual.pow(3).sum()


def _mlp(checkpoint_lvl: int) -> Callable[..., Tensor]:
    def mlp(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = fused_mlp_func(x, weight, weight.T, bias, None, checkpoint_lvl=checkpoint_lvl)
        return out.square().mean()

    return mlp


def _mlp_in_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    hidden = F.gelu(F.linear(x, weight, bias), approximate="tanh")
    return F.linear(hidden, weight.T).square().mean()


def _loss(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    assert isinstance(result, Tensor)
    return result


class Op(NamedTuple):
    """A scalar of an op, the same in torch, and their arguments' shapes; rows first, [4, 8]."""

    op: Callable[..., Tensor]
    torchs: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]


OPS = {
    "attention": Op(_attention, _attention_in_torch, ((4, 8), (4, 8), (4, 8))),
    "fused_dense": Op(
        _dense,
        lambda x, w, b: F.linear(x, w, b).square().sum() + x.pow(3).sum(),
        ((4, 8), (5, 8), (5,)),
    ),
    "fused_mlp": Op(_mlp(0), _mlp_in_torch, ((4, 8), (5, 8), (5,))),
    "fused_mlp, checkpointed": Op(_mlp(2), _mlp_in_torch, ((4, 8), (5, 8), (5,))),
    "layer_norm": Op(
        lambda x, w, b: layer_norm(x, w, b, 1e-5).square().sum(),
        lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, 1e-5).square().sum(),
        ((4, 8), (8,), (8,)),
    ),
    "rms_norm": Op(
        lambda x, w: rms_norm(x, w, 1e-5).pow(3).sum(),
        lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-5).pow(3).sum(),
        ((4, 8), (8,)),
    ),
    "dropout_add_layer_norm": Op(_add_norm, _add_norm_in_torch, ((4, 8), (8,), (8,))),
    "cross_entropy": Op(
        lambda x: cross_entropy_loss(x, _LABELS)[0].square().sum(),
        lambda x: F.cross_entropy(x, _LABELS, reduction="none").square().sum(),
        ((4, 8),),
    ),
    "cross_entropy, in place": Op(
        lambda x: cross_entropy_loss(x, _LABELS, inplace_backward=True)[0].square().sum(),
        lambda x: F.cross_entropy(x, _LABELS, reduction="none").square().sum(),
        ((4, 8),),
    ),
    "linear_cross_entropy": Op(
        lambda x, w, b: _loss(linear_cross_entropy(x, w, _LABELS, b)).square(),
        lambda x, w, b: F.cross_entropy(F.linear(x, w, b), _LABELS).square(),
        ((4, 8), (5, 8), (5,)),
    ),
}


@pytest.fixture(params=OPS.values(), ids=list(OPS))
def op(request: pytest.FixtureRequest) -> Op:
    torch.manual_seed(0)
    return request.param


def _inputs(op: Op) -> list[Tensor]:
    return [torch.randn(shape) for shape in op.shapes]


def test_grad_of_any_arguments(op: Op) -> None:
    inputs = _inputs(op)
    every = tuple(range(len(inputs)))
    for argnums in (every, (0,), every[-1:]):
        ours = grad(op.op, argnums)(*inputs)
        torch.testing.assert_close(ours, grad(op.torchs, argnums)(*inputs))


def test_grad_where_a_leaf_requires_grad_too(op: Op) -> None:
    inputs = _inputs(op)
    leaves = [inputs[0], *(t.requires_grad_() for t in inputs[1:])]
    torch.testing.assert_close(grad(op.op)(*leaves), grad(op.torchs)(*leaves))


def test_vmap_of_grad_and_grad_of_vmap(op: Op) -> None:
    inputs = _inputs(op)
    batch = torch.stack([inputs[0], 2 * inputs[0], -inputs[0]])
    dims = (0, *(None for _ in inputs[1:]))
    every = tuple(range(len(inputs)))
    ours, torchs = (vmap(grad(f, every), dims)(batch, *inputs[1:]) for f in (op.op, op.torchs))
    torch.testing.assert_close(ours, torchs)
    ours, torchs = (
        grad(lambda *args, f=f: vmap(f, dims)(*args).sum(), every)(batch, *inputs[1:])
        for f in (op.op, op.torchs)
    )
    torch.testing.assert_close(ours, torchs)


def test_a_vjp_may_be_called_again(op: Op) -> None:
    _, pull_back = vjp(op.op, *_inputs(op))
    torch.testing.assert_close(pull_back(torch.tensor(3.0)), pull_back(torch.tensor(3.0)))


def test_jacobian() -> None:
    x, weight = torch.randn(3, 5), torch.randn(5)
    ours = jacrev(lambda x: layer_norm(x, weight, None, 1e-5))(x)
    torchs = jacrev(lambda x: F.layer_norm(x, (5,), weight, None, 1e-5))(x)
    torch.testing.assert_close(ours, torchs)


def test_second_derivatives_raise(op: Op) -> None:
    """A penalty on a gradient does not silently count for nothing."""
    inputs = _inputs(op)
    with pytest.raises(RuntimeError, match="got a second derivative"):
        grad(lambda x: grad(op.op)(x, *inputs[1:]).sum())(inputs[0])
    x = inputs[0].requires_grad_()
    loss = op.op(x, *inputs[1:])
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="got a second derivative"):
        (loss + gradient.sum()).backward()


def test_a_second_derivative_through_a_plain_sum_raises() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    loss = layer_norm(x, torch.randn(5), None, 1e-5).sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="got a second derivative"):
        (loss + gradient.square().sum()).backward()


class _DoubleInPlace(Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.mark_dirty(x)
        return x.mul_(2), None

    @staticmethod
    @once_differentiable
    def backward(ctx, dx, _):
        return 2 * dx, None


def test_a_function_that_writes_in_place() -> None:
    x = torch.randn(4)
    gradient = grad(lambda x: _DoubleInPlace.apply(x * x, None)[0].sum())(x)
    torch.testing.assert_close(gradient, 4 * x)
