"""Every op compiled, on tensors that enter the graph and on those that the graph computes.

An op that writes to an argument, or to what was saved, may be compiled rightly for one of the two
alone: results, gradients and all that was written must be those of eager calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtrain.ops import attention, fused_dense, layer_norm, rotary
from flashtrain.ops.cross_entropy import cross_entropy_loss
from flashtrain.ops.linear_cross_entropy import linear_cross_entropy

_LABELS = torch.tensor([2, 0, 4, 1, 7, 3])
_COS, _SIN = torch.rand(2, 6, 4)
_QKV = (2, 6, 2, 8)


def _norm_into(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        out, total = torch.zeros(6, 8), torch.zeros(6, 8)
        layer_norm.layer_norm_fn(
            x, weight, None, residual, prenorm=True, out=out, residual_out=total
        )
    return out + x, total


# A function, and the shapes of its tensors. rotary's own tests have more of its functions.
_OPS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "layer_norm": (lambda x, w, b: layer_norm.layer_norm(x, w, b, 1e-5), [(6, 8), (8,), (8,)]),
    "dropout_add_rms_norm": (
        lambda x, r, w: layer_norm.dropout_add_rms_norm(x, r, w, None, 0.0, 1e-5, prenorm=True),
        [(6, 8), (6, 8), (8,)],
    ),
    "layer_norm_fn, out": (_norm_into, [(6, 8), (6, 8), (8,)]),
    "cross_entropy": (lambda x: cross_entropy_loss(x, _LABELS)[0], [(6, 8)]),
    "cross_entropy, in place": (
        lambda x: cross_entropy_loss(x, _LABELS, inplace_backward=True)[0], [(6, 8)],
    ),
    "linear_cross_entropy": (lambda x, w: linear_cross_entropy(x, w, _LABELS), [(6, 8), (9, 8)]),
    "rotary, in place": (
        lambda x: rotary.apply_rotary_emb(x, _COS, _SIN, inplace=True), [_QKV],
    ),
    "attention": (attention.flash_attn_func, [_QKV] * 3),
    "fused_dense": (fused_dense.fused_dense_func, [(6, 8), (5, 8), (5,)]),
    "fused_mlp": (fused_dense.fused_mlp_func, [(6, 8), (16, 8), (8, 16), (16,), (8,)]),
}  # fmt: skip


def _run(function: Callable[..., Any], leaves: list[Tensor]) -> list[Tensor]:
    """Results, the tensors after the call, and the gradients of both."""
    inputs = [leaf * 1.0 for leaf in leaves]
    results = function(*inputs)
    results = list(results) if isinstance(results, tuple) else [results]
    results = [*(t for t in results if t.requires_grad), *inputs]
    weights = [torch.linspace(-1, 1, t.numel()).view_as(t) for t in results]
    values = [t.detach().clone() for t in results]  # backward may overwrite them
    return [*values, *torch.autograd.grad(results, leaves, weights)]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("where", ["input", "intermediate"])
@pytest.mark.parametrize("name", _OPS)
def test_compiled(name: str, where: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    op, shapes = _OPS[name]
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]

    def call(*tensors: Tensor) -> Any:
        return op(*(t.sin() for t in tensors) if where == "intermediate" else tensors)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(_run(compiled, leaves), _run(call, leaves))


@pytest.mark.parametrize("buffers", [("out",), ("residual_out",), ("out", "residual_out")])
def test_buffers_that_enter_the_graph(buffers: tuple[str, ...]) -> None:
    torch._dynamo.reset()
    x, residual, weight = torch.randn(6, 8), torch.randn(6, 8), torch.randn(8)

    def call(x: Tensor, residual: Tensor | None, **into: Tensor) -> Any:
        return layer_norm.layer_norm_fn(x, weight, None, residual, prenorm=True, **into)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for other in (residual, None):
        expected = call(x, other)
        for function in (call, compiled):
            into = {name: torch.zeros(6, 8) for name in buffers}
            torch.testing.assert_close(function(x, other, **into), expected)
            for name, buffer in into.items():
                assert torch.equal(buffer, expected[name == "residual_out"])
    # x itself is a buffer, and the sum that is returned is x as it was.
    expected = call(x, None)
    for function in (call, compiled):
        operand = x.clone()
        torch.testing.assert_close(function(operand, None, out=operand), expected)


@pytest.mark.parametrize("name", ["out", "residual_out"])
def test_buffers_whose_elements_share_memory(name: str) -> None:
    x, weight = torch.randn(6, 8), torch.randn(8)
    for buffer in (torch.zeros(8).expand(6, 8), torch.zeros(13).as_strided((6, 8), (1, 1))):
        with pytest.raises(ValueError, match=f"^{name}: got strides .*elements share memory"):
            layer_norm.layer_norm_fn(x, weight, None, prenorm=True, **{name: buffer})
    both = torch.zeros(7, 8)
    with pytest.raises(ValueError, match="residual_out: shares memory with out"):
        layer_norm.layer_norm_fn(x, weight, None, out=both[1:], residual_out=both[:6])
    logits = torch.randn(8).expand(6, 8)
    with pytest.raises(ValueError, match=r"logits: got strides .*elements share memory"):
        cross_entropy_loss(logits, _LABELS, inplace_backward=True)
    cross_entropy_loss(logits, _LABELS)
