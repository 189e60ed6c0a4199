"""The forms of the norms on tensors of other kinds: compiled, fake, negative views; buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtrain.compat.flash_attn.ops import layer_norm as ln
from flashtrain.compat.flash_attn.ops.triton.layer_norm import layer_norm_fn
from flashtrain.testing import contract
from flashtrain.testing.devices import DEVICE


def _norm_into(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        out, total = torch.zeros(6, 8), torch.zeros(6, 8)
        layer_norm_fn(x, weight, None, residual, prenorm=True, out=out, residual_out=total)
    return out + x, total


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("where", ["input", "intermediate"])
def test_compiled(where: str, dynamic: bool) -> None:
    contract.assert_compiled_as_eager(
        _norm_into, [(6, 8), (6, 8), (8,)], intermediate=where == "intermediate", dynamic=dynamic
    )


@pytest.mark.parametrize("buffers", [("out",), ("residual_out",), ("out", "residual_out")])
def test_buffers_that_enter_the_graph(buffers: tuple[str, ...]) -> None:
    torch._dynamo.reset()
    x, residual, weight = torch.randn(6, 8), torch.randn(6, 8), torch.randn(8)

    def call(x: Tensor, residual: Tensor | None, **into: Tensor) -> Any:
        return layer_norm_fn(x, weight, None, residual, prenorm=True, **into)

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
            layer_norm_fn(x, weight, None, prenorm=True, **{name: buffer})
    both = torch.zeros(7, 8)
    with pytest.raises(ValueError, match="residual_out: shares memory with out"):
        layer_norm_fn(x, weight, None, out=both[1:], residual_out=both[:6])


def _inputs(device: str) -> contract.Inputs:
    inputs = {name: torch.randn(8, device=device, requires_grad=True) for name in ("w", "b")}
    inputs["x"] = torch.randn(4, 8, device=device, requires_grad=True)
    return inputs | {"subset": torch.tensor([1, 0, 2, 0], device=device)}


_FORMS: dict[str, Callable[[contract.Inputs], Any]] = {
    "subset": lambda i: ln.dropout_add_layer_norm_subset(
        i["x"], i["x"], i["w"], i["b"], 0.0, 1e-5, out_subset=i["subset"], out_numrows=2
    ),
    "parallel_residual": lambda i: ln.dropout_add_layer_norm_parallel_residual(
        i["x"], i["x"], None, i["w"], i["b"], i["w"], i["b"], 0.1, 1e-5
    ),
    "layer_norm_fn": lambda i: layer_norm_fn(i["x"], i["w"], i["b"]),
}


@pytest.mark.parametrize("name", _FORMS)
def test_fake_in_fake_out(name: str) -> None:
    contract.assert_fake_in_fake_out(_FORMS[name], _inputs)


def test_negative_views() -> None:
    contract.assert_negative_views_count_as_shown(
        lambda x, w, b, r: layer_norm_fn(x, w, b, r),
        [(6, 8), (8,), (8,), (6, 8)],
    )
    x, out = torch.randn(6, 8, device=DEVICE), torch._neg_view(torch.zeros(6, 8, device=DEVICE))
    weight = torch.ones(8, device=DEVICE)
    y = layer_norm_fn(x, weight, None, out=out)
    torch.testing.assert_close(y, layer_norm_fn(x, weight, None))
