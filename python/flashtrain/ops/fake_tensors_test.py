"""Fake and meta tensors into the norms and cross entropies, in and out of a mode, forward and back:
results of the same kind, shapes and dtypes as of real ones, and no look at what they do not hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from flashtrain.ops import layer_norm as ln
from flashtrain.ops.cross_entropy import cross_entropy_loss
from flashtrain.ops.linear_cross_entropy import linear_cross_entropy

Inputs = dict[str, Tensor]


def _inputs(device: str = "cpu") -> Inputs:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, requires_grad=True)

    return {
        "x": randn(4, 8),
        "w": randn(8),
        "b": randn(8),
        "head": randn(17, 8),
        "labels": torch.tensor([3, 0, 16, -100], device=device),
        "subset": torch.tensor([1, 0, 2, 0], device=device),
    }


OPS: dict[str, Callable[[Inputs], Any]] = {
    "layer_norm": lambda i: ln.layer_norm(i["x"], i["w"], i["b"], 1e-5),
    "dropout_add_layer_norm": lambda i: ln.dropout_add_layer_norm(
        i["x"], i["x"], i["w"], i["b"], 0.5, 1e-5, prenorm=True, return_dropout_mask=True
    ),
    "rms_norm": lambda i: ln.rms_norm(i["x"], i["w"], 1e-5),
    "subset": lambda i: ln.dropout_add_layer_norm_subset(
        i["x"], i["x"], i["w"], i["b"], 0.0, 1e-5, out_subset=i["subset"], out_numrows=2
    ),
    "parallel_residual": lambda i: ln.dropout_add_layer_norm_parallel_residual(
        i["x"], i["x"], None, i["w"], i["b"], i["w"], i["b"], 0.1, 1e-5
    ),
    "layer_norm_fn": lambda i: ln.layer_norm_fn(i["x"], i["w"], i["b"]),
    "cross_entropy_loss": lambda i: cross_entropy_loss(i["x"] @ i["head"].T, i["labels"]),
    "cross_entropy_loss in place": lambda i: cross_entropy_loss(
        i["x"] @ i["head"].T, i["labels"], inplace_backward=True
    ),
    "linear_cross_entropy": lambda i: linear_cross_entropy(i["x"], i["head"], i["labels"]),
    "linear_cross_entropy, all rows": lambda i: linear_cross_entropy(
        i["x"].detach(), i["head"].detach(), i["labels"], reduction="none"
    ),
}


def _results(function: Callable[[Inputs], Any], inputs: Inputs) -> list[Tensor]:
    """What the op returns, and the gradients."""
    results = function(inputs)
    results = [t for t in (results if isinstance(results, tuple) else (results,)) if t is not None]
    sums = [t.sum() for t in results if t.requires_grad]
    leaves = [t for t in inputs.values() if t.requires_grad]
    gradients = torch.autograd.grad(sums, leaves, allow_unused=True) if sums else ()
    return [*results, *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("name", OPS)
def test_fake_in_fake_out(name: str) -> None:
    expected = _results(OPS[name], _inputs())
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    real = _inputs()
    fake = {key: mode.from_tensor(value) for key, value in real.items()}
    with mode:
        inside = _results(OPS[name], fake)
        of_real = _results(OPS[name], real)
    outside = _results(OPS[name], fake)
    meta = _results(OPS[name], _inputs("meta"))
    for results, kind in ((inside, "fake"), (of_real, "fake"), (outside, "fake"), (meta, "meta")):
        assert len(results) == len(expected)
        for result, real_one in zip(results, expected):
            assert result.is_meta if kind == "meta" else isinstance(result, FakeTensor)
            assert (result.shape, result.dtype) == (real_one.shape, real_one.dtype)
