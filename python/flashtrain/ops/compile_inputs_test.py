"""Every op compiled, on tensors that enter the graph and on those that the graph computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flashtrain.ops import attention, fused_dense, layer_norm, rotary
from flashtrain.ops.cross_entropy import cross_entropy_loss
from flashtrain.ops.linear_cross_entropy import linear_cross_entropy
from flashtrain.testing.contract import assert_compiled_as_eager

_LABELS = torch.tensor([2, 0, 4, 1, 7, 3])
_COS, _SIN = torch.rand(2, 6, 4)
_QKV = (2, 6, 2, 8)

# A function, and the shapes of its tensors. rotary's own tests have more of its functions.
_OPS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "layer_norm": (lambda x, w, b: layer_norm.layer_norm(x, w, b, 1e-5), [(6, 8), (8,), (8,)]),
    "dropout_add_rms_norm": (
        lambda x, r, w: layer_norm.dropout_add_rms_norm(x, r, w, None, 0.0, 1e-5, prenorm=True),
        [(6, 8), (6, 8), (8,)],
    ),
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


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("where", ["input", "intermediate"])
@pytest.mark.parametrize("name", _OPS)
def test_compiled(name: str, where: str, dynamic: bool) -> None:
    op, shapes = _OPS[name]
    assert_compiled_as_eager(op, shapes, intermediate=where == "intermediate", dynamic=dynamic)


def test_logits_whose_elements_share_memory() -> None:
    logits = torch.randn(8).expand(6, 8)
    with pytest.raises(ValueError, match=r"logits: got strides .*elements share memory"):
        cross_entropy_loss(logits, _LABELS, inplace_backward=True)
    cross_entropy_loss(logits, _LABELS)
