"""Reports about attention packages, held against flashtrain.ops.attention."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flashtrain.ops.attention import dispatch, flash_attn_func, flash_attn_varlen_func

# Dao-AILab/flash-attention#836, a package built for another torch, is in
# //python/flashtrain/ops/attention:dispatch_test.


def _cu_seqlens(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([*itertools.accumulate(lengths, initial=0)], dtype=torch.int32)


# --- Arguments as code written for flash-attn passes them -----------------------------------------

CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a list": ({"window_size": [2, 0]}, {"window_size": (2, 0)}),
    "numpy integers": ({"window_size": (np.int64(2), np.int32(1))}, {"window_size": (2, 1)}),
    "below -1": ({"window_size": (-7, -100)}, {}),
    "wider than all": ({"window_size": (2**62, 2**31 - 1)}, {}),
    "1 for True": ({"causal": 1}, {"causal": True}),
    "numpy's True": ({"causal": np.bool_(True)}, {"causal": True}),
    "None for False": ({"causal": None, "deterministic": None}, {}),
    "numpy's float": ({"softmax_scale": np.float32(0.25)}, {"softmax_scale": 0.25}),
    "a 0-dim tensor": ({"softmax_scale": torch.tensor(0.25)}, {"softmax_scale": 0.25}),
    "an integer": ({"softcap": 3, "softmax_scale": 1}, {"softcap": 3.0, "softmax_scale": 1.0}),
    "0-dim dropout": ({"dropout_p": torch.tensor(0.0)}, {}),
    "0 for dropout": ({"dropout_p": 0}, {}),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_types_of_arguments(call: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """As flash-attn's, which are torch's own custom ops and convert all of these."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 8, 2, 16)
    given, plain = call
    assert torch.equal(flash_attn_func(q, k, v, **given), flash_attn_func(q, k, v, **plain))


@pytest.mark.parametrize(
    "longest",
    [torch.tensor(8), torch.tensor([8]), np.int64(8), 16, 2**31 - 1, 2**62],
    ids=["0-dim", "1-dim", "numpy", "total", "int32", "int64"],
)
def test_longest_sequence_of_any_type_and_size(longest: Any) -> None:
    """An upper bound is as good as the longest length."""
    torch.manual_seed(0)
    cu_seqlens, leaves = _cu_seqlens((8, 3, 5)), torch.randn(3, 16, 2, 16).unbind()
    runs = []
    for bound in (8, longest):
        q, k, v = (t.clone().requires_grad_() for t in leaves)
        out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, bound, bound, causal=True)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(ours, expected) for expected, ours in zip(*runs))


@pytest.mark.parametrize("causal", [False, True])
def test_a_scale_of_0_is_no_default(causal: bool) -> None:
    """flash-attn has its default for None alone; with 0 all keys that are seen weigh the same."""
    q, k, v = torch.randn(3, 2, 8, 2, 16).requires_grad_().unbind()
    out = flash_attn_func(q, k, v, softmax_scale=0, causal=causal)
    mean = v.mean(1, keepdim=True).expand(v.shape)
    if causal:
        mean = v.cumsum(1) / torch.arange(1, 9).view(8, 1, 1)
    torch.testing.assert_close(out, mean)
    dq, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v), retain_graph=True)
    assert not dq.any()
    assert not dk.any()
    torch.testing.assert_close(dv, torch.autograd.grad(mean.square().sum(), v)[0])


def test_no_backend_of_others_is_given_a_scale_of_0() -> None:
    request = dispatch.Request(
        "cuda", 90, torch.bfloat16, 64, 8, 8, False, False, -1, 0, False, False, False, False,
        True, False, zero_scale=True,
    )  # fmt: skip
    assert dispatch.choose(request, {}, []) == "triton"


# --- Sequences of odd lengths ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"),
    [
        ((0, 1, 0, 1), (0, 3, 0, 5)),
        ((0, 3, 0, 0, 5, 1, 0), (0, 3, 0, 0, 5, 1, 0)),
        ((150, 0, 7), (100, 9, 3)),
        ((1,), (1,)),
        ((), ()),
        ((0, 0), (0, 0)),
    ],
)
def test_sequences_of_odd_lengths(lengths_q: tuple[int, ...], lengths_k: tuple[int, ...]) -> None:
    """Dao-AILab/flash-attention#1537: empty sequences, and a longest of 1; head dim 33."""
    torch.manual_seed(0)
    heads, heads_k = 9, 3
    q = torch.randn(sum(lengths_q), heads, 33, requires_grad=True)
    k, v = (torch.randn(sum(lengths_k), heads_k, 33, requires_grad=True) for _ in range(2))
    bounds = _cu_seqlens(lengths_q), _cu_seqlens(lengths_k)
    longest = max(lengths_q, default=0), max(lengths_k, default=0)
    out = flash_attn_varlen_func(q, k, v, *bounds, *longest, causal=True)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    groups = [exact[0].split(lengths_q), *(t.split(lengths_k) for t in exact[1:])]
    parts = [exact[0][:0]]
    for queries, keys, values in zip(*groups):
        keys, values = (t.repeat_interleave(heads // heads_k, 1) for t in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * 33**-0.5
        seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(len(keys) - len(queries))
        weights = scores.masked_fill(~seen, -1e30).softmax(-1) * seen
        parts.append(torch.einsum("hqk,khd->qhd", weights, values))
    expected = torch.cat(parts)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4)
    ours = torch.autograd.grad(out.square().sum(), (q, k, v))
    theirs = torch.autograd.grad(expected.square().sum(), exact, allow_unused=True)
    for gradient, other in zip(ours, theirs):
        other = torch.zeros_like(gradient) if other is None else other
        torch.testing.assert_close(gradient.double(), other.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "bounds", [(0, 4), (2, 6), (0, 4, 3, 6), (0, 7), (0, -1, 6), (0, 2**31 - 1)], ids=str
)
def test_rows_of_no_sequence_and_bounds_of_no_rows(bounds: tuple[int, ...]) -> None:
    """pytorch/pytorch#188933: refused in one line."""
    x, cu_seqlens = torch.randn(6, 2, 8), torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens_q") as error:
        flash_attn_varlen_func(x, x, x, cu_seqlens, cu_seqlens, 6, 6)
    assert "\n" not in str(error.value)


# --- Tensors of other kinds -----------------------------------------------------------------------


@pytest.mark.parametrize("negative", range(4), ids=["q", "k", "v", "gradient"])
def test_views_with_a_negative_bit(negative: int) -> None:
    """What a view shows counts, not what its memory holds."""
    torch.manual_seed(0)
    tensors = list(torch.randn(4, 2, 8, 2, 16).unbind())
    tensors[negative] = torch._neg_view(tensors[negative])

    def run(of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        *qkv, dout = map(of, tensors)
        q, k, v = (t.detach().requires_grad_() for t in qkv)
        out = flash_attn_func(q, k, v, causal=True)
        return [out, *torch.autograd.grad(out, (q, k, v), dout)]

    for ours, expected in zip(run(lambda t: t), run(lambda t: t.resolve_neg().clone())):
        assert torch.equal(ours, expected)


def test_inputs_that_overlap() -> None:
    """One row for all, and one tensor for q, k and v: reading them is fine."""
    row = torch.randn(1, 1, 1, 16, requires_grad=True)
    x = row.expand(2, 8, 2, 16)
    out = flash_attn_func(x, x, x)
    torch.testing.assert_close(out, x)
    (gradient,) = torch.autograd.grad(out.sum(), row)
    torch.testing.assert_close(gradient, torch.full_like(row, 32.0), rtol=1e-4, atol=1e-4)
