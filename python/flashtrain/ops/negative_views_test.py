"""Views with a negative bit into every op, forward and backward: what they show is what counts.

pytorch/pytorch's `x.conj().imag` and `torch._neg_view` are such views.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flashtrain.ops import adamw, attention, fused_dense, layer_norm, rotary
from flashtrain.ops.cross_entropy import cross_entropy_loss
from flashtrain.ops.linear_cross_entropy import linear_cross_entropy
from flashtrain.testing.contract import assert_negative_views_count_as_shown
from flashtrain.testing.devices import DEVICE

_LABELS = torch.tensor([2, 0, 4, 1, 7, 3], device=DEVICE)
_TABLES = (6, 4)
_QKV = (2, 6, 2, 8)
_CU = torch.tensor([0, 4, 12], dtype=torch.int32, device=DEVICE)

# A function, and the shapes of its tensors.
_OPS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "layer_norm": (lambda x, w, b: layer_norm.layer_norm(x, w, b, 1e-5), [(6, 8), (8,), (8,)]),
    "rms_norm": (lambda x, w: layer_norm.rms_norm(x, w, 1e-5), [(6, 8), (8,)]),
    "dropout_add_layer_norm": (
        lambda x, r, w, b: layer_norm.dropout_add_layer_norm(x, r, w, b, 0.0, 1e-5),
        [(6, 8), (6, 8), (8,), (8,)],
    ),
    "cross_entropy": (lambda x: cross_entropy_loss(x, _LABELS)[0], [(6, 8)]),
    "cross_entropy, in place": (
        lambda x: cross_entropy_loss(x, _LABELS, inplace_backward=True)[0], [(6, 8)],
    ),
    "linear_cross_entropy": (lambda x, w: linear_cross_entropy(x, w, _LABELS), [(6, 8), (9, 8)]),
    "rotary": (rotary.apply_rotary_emb, [_QKV, _TABLES, _TABLES]),
    "attention": (attention.flash_attn_func, [_QKV] * 3),
    "attention of sequences": (
        lambda q, k, v: attention.flash_attn_varlen_func(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), _CU, _CU, 8, 8, causal=True
        ),
        [_QKV] * 3,
    ),
    "fused_dense": (fused_dense.fused_dense_func, [(6, 8), (5, 8), (5,)]),
    "fused_mlp": (fused_dense.fused_mlp_func, [(6, 8), (16, 8), (8, 16), (16,), (8,)]),
}  # fmt: skip


@pytest.mark.parametrize("name", _OPS)
def test_negative_views(name: str) -> None:
    op, shapes = _OPS[name]
    half = DEVICE.type == "cuda" and "attention" in name
    assert_negative_views_count_as_shown(
        op, shapes, dtype=torch.bfloat16 if half else torch.float32,
        no_grad=(1, 2) if name == "rotary" else (), in_place="in place" in name,
    )  # fmt: skip


def test_in_place_on_negative_views() -> None:
    """Written as they show, or refused."""
    logits = torch.randn(6, 8, device=DEVICE)
    leaf = (-logits).requires_grad_()
    losses, _ = cross_entropy_loss(leaf, _LABELS)
    (expected,) = torch.autograd.grad(losses.sum(), leaf)
    negative = torch._neg_view(logits.clone()).requires_grad_()
    losses, _ = cross_entropy_loss(negative, _LABELS, inplace_backward=True)
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), negative)[0], expected)

    cos, sin = torch.rand(2, *_TABLES, device=DEVICE)
    q = torch._neg_view(torch.randn(_QKV, device=DEVICE))
    kept = q.clone()
    with pytest.raises(ValueError, match="x: is a view with a negative bit"):
        rotary.apply_rotary_emb(q, cos, sin, inplace=True)
    assert torch.equal(q, kept)


def test_optimizer() -> None:
    grads = [torch.randn(5, 3, device=DEVICE), torch.randn(7, device=DEVICE)]
    negative = [torch._neg_view(-grad) for grad in grads]
    assert torch.equal(adamw.global_grad_norm(negative), adamw.global_grad_norm(grads))
    results = []
    for of_step in (grads, negative):
        params = [torch.nn.Parameter(torch.ones_like(grad)) for grad in grads]
        for param, grad in zip(params, of_step):
            param.grad = grad
        adamw.FusedAdamW(params, lr=0.1).step()
        results.append(params)
    torch.testing.assert_close(*results)
    with pytest.raises(ValueError, match="negative bit"):
        adamw.FusedAdamW([torch.nn.Parameter(torch._neg_view(grads[0]))])
