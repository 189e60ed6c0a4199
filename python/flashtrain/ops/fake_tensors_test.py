"""Fake and meta tensors into the norms and cross entropies, in and out of a mode, forward and back:
results of the same kind, shapes and dtypes as of real ones, and no look at what they do not hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtrain.ops import layer_norm as ln
from flashtrain.ops.cross_entropy import cross_entropy_loss
from flashtrain.ops.layer_norm.parallel import parallel_add_norm
from flashtrain.ops.linear_cross_entropy import linear_cross_entropy
from flashtrain.testing.contract import Inputs, assert_fake_in_fake_out


def _inputs(device: str) -> Inputs:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, requires_grad=True)

    return {
        "x": randn(4, 8),
        "w": randn(8),
        "b": randn(8),
        "head": randn(17, 8),
        "labels": torch.tensor([3, 0, 16, -100], device=device),
    }


OPS: dict[str, Callable[[Inputs], Any]] = {
    "layer_norm": lambda i: ln.layer_norm(i["x"], i["w"], i["b"], 1e-5),
    "dropout_add_layer_norm": lambda i: ln.dropout_add_layer_norm(
        i["x"], i["x"], i["w"], i["b"], 0.5, 1e-5, prenorm=True, return_dropout_mask=True
    ),
    "rms_norm": lambda i: ln.rms_norm(i["x"], i["w"], 1e-5),
    "parallel_add_norm": lambda i: parallel_add_norm(
        i["x"], i["x"], None, i["w"], i["b"], i["w"], i["b"], 0.1, 1e-5
    ),
    "cross_entropy_loss": lambda i: cross_entropy_loss(i["x"] @ i["head"].T, i["labels"]),
    "cross_entropy_loss in place": lambda i: cross_entropy_loss(
        i["x"] @ i["head"].T, i["labels"], inplace_backward=True
    ),
    "linear_cross_entropy": lambda i: linear_cross_entropy(i["x"], i["head"], i["labels"]),
    "linear_cross_entropy, all rows": lambda i: linear_cross_entropy(
        i["x"].detach(), i["head"].detach(), i["labels"], reduction="none"
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_fake_in_fake_out(name: str) -> None:
    assert_fake_in_fake_out(OPS[name], _inputs)
