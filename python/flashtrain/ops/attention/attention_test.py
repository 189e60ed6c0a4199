"""Our attention kernels against the reference: sizes, features, layouts, dropout, odd numbers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from flashtrain.ops import attention as attn
from flashtrain.ops.attention.cases import (
    BF16,
    FP16,
    FP32,
    NATIVE,
    Case,
    attend,
    check,
    next_rng_state,
    results_and_gradients,
)
from flashtrain.ops.reference import attention as reference
from flashtrain.testing.devices import DEVICE, needs_gpu_memory, poisoned_memory


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with poisoned_memory():
        yield


# --- Numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k"),
    [(1, 1), (1, 65), (3, 2), (63, 64), (64, 63), (65, 65), (128, 128), (129, 300), (300, 129)],
)
def test_sequence_lengths(seqlen_q: int, seqlen_k: int, causal: bool) -> None:
    check(Case(1, seqlen_q, seqlen_k, head_dim=32, causal=causal))


@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_k"), [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_empty_tensors(batch: int, seqlen_q: int, seqlen_k: int) -> None:
    shapes = [(batch, s, 2, 16) for s in (seqlen_q, seqlen_k, seqlen_k)]
    q, k, v = (torch.randn(s, device=DEVICE, dtype=BF16, requires_grad=True) for s in shapes)
    out = attn.flash_attn_func(q, k, v, causal=True)
    assert (out == 0).all()
    for grad, tensor in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v)):
        assert grad.shape == tensor.shape
        assert (grad == 0).all()


# Triton compiles three kernels, 3 to 10 s, for each: on CUDA a few that have every width in both.
_HEAD_DIMS = [
    (d, dtype) for d in (1, 7, 16, 40, 64, 80, 96, 128, 200, 256) for dtype in (FP32, FP16, BF16)
]
_HEAD_DIMS_CUDA = [
    (1, BF16), (16, FP32), (40, FP16), (64, FP32), (80, BF16), (96, FP16), (128, FP32),
    (200, BF16), (256, BF16), (256, FP32),
]  # fmt: skip


@pytest.mark.parametrize(("head_dim", "dtype"), _HEAD_DIMS if NATIVE == "cpu" else _HEAD_DIMS_CUDA)
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    check(Case(1, 70, 70, head_dim=head_dim, dtype=dtype))


@pytest.mark.skipif(NATIVE != "cpu", reason="Triton kernels hold a head in registers")
def test_huge_head_dim() -> None:
    check(Case(1, 70, 70, head_dim=1000, dtype=FP32))


@pytest.mark.parametrize(("heads", "heads_k"), [(1, 1), (4, 2), (6, 1), (5, 5)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_grouped_heads(heads: int, heads_k: int, dropout_p: float) -> None:
    check(Case(2, 90, 140, heads, heads_k, 64, dropout_p=dropout_p))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("window", [(0, 0), (20, 0), (70, 33), (-1, 5), (90, -1), (1000, 1000)])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(150, 150), (150, 200), (200, 100)])
def test_windows(seqlen_q: int, seqlen_k: int, window: tuple[int, int], causal: bool) -> None:
    check(Case(1, seqlen_q, seqlen_k, head_dim=32, window=window, causal=causal))


_LENGTHS = ((70, 70), (0, 0), (1, 1), (33, 90), (90, 33), (5, 0), (0, 7), (128, 128))


# All but none; on CUDA each alone, and all.
_FEATURES = [
    c for c in itertools.product((0.0, 5.0), (False, True), (0.0, 0.2), (False, True)) if any(c)
]
_FEATURES_CUDA = [
    (5.0, False, 0.0, False), (0.0, True, 0.0, False), (0.0, False, 0.2, False),
    (0.0, False, 0.0, True), (5.0, True, 0.2, True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("softcap", "alibi", "dropout_p", "varlen"), _FEATURES if NATIVE == "cpu" else _FEATURES_CUDA
)
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_features_together(dtype, softcap, alibi, dropout_p, varlen) -> None:
    check(
        Case(
            2, 90, 110, 4, 2, 64, _LENGTHS if varlen else (), dtype, softcap=softcap, alibi=alibi,
            dropout_p=dropout_p, scale=0.2,
        )
    )  # fmt: skip


@pytest.mark.parametrize("window", [(-1, -1), (25, 9)])
def test_varlen_with_windows(window: tuple[int, int]) -> None:
    check(Case(heads=4, heads_k=2, lengths=_LENGTHS, window=window, causal=False))


def test_documents_in_one_window_are_kept_apart() -> None:
    """A change in one document leaves the others as they were, in both directions."""
    lengths = ((40, 40), (60, 60), (28, 28))
    case = Case(heads=2, lengths=lengths, dtype=FP32, head_dim=32)
    inputs = case.inputs()
    before = results_and_gradients(inputs, case.ours(inputs))
    changed = {name: t.detach().clone() for name, t in inputs.items()}
    for tensor in changed.values():
        tensor[40:100] += 1.0
        tensor.requires_grad_()
    after = results_and_gradients(changed, case.ours(changed))
    for name in before:
        assert torch.equal(before[name][:40], after[name][:40]), name
        assert torch.equal(before[name][100:], after[name][100:]), name
        assert not torch.equal(before[name][40:100], after[name][40:100]), name


def test_equal_lengths_are_a_batch() -> None:
    batched = Case(3, 50, 50, 4, 2, 32, dropout_p=0.3)
    varlen = Case(3, heads=4, heads_k=2, head_dim=32, lengths=((50, 50),) * 3, dropout_p=0.3)
    inputs = batched.inputs()
    results = []
    for case in (batched, varlen):
        torch.manual_seed(3)
        results.append(results_and_gradients(inputs, case.ours(inputs)))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=0, msg=name)


def test_queries_that_see_nothing() -> None:
    case = Case(1, 100, 30, head_dim=32, dtype=FP32)
    inputs = case.inputs()
    out, lse, _ = case.ours(inputs, return_attn_probs=True)
    assert (out[0, :70] == 0).all()
    assert (lse[..., :70] == -torch.inf).all()
    assert lse[..., 70:].isfinite().all()
    dq, dk, dv = torch.autograd.grad(out.sum(), list(inputs.values()))
    assert (dq[:70] == 0).all()
    assert dk.isfinite().all()
    assert dv.isfinite().all()


def test_large_scores_do_not_overflow() -> None:
    """Scores to 130: exp overflows in float32 at 89.

    The largest errors are those of the few queries whose largest scores are nearly equal; with a
    batch of 16 both sides have some of these.
    """
    check(Case(16, 64, 64, dtype=FP32, scale=4.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_non_finite_values(name: str, bad: float) -> None:
    """They are where the plain expression has them; other sequences stay as they are."""
    case = Case(2, 40, 40, head_dim=32, dtype=FP32, causal=False)
    inputs = {n: t.detach().clone() for n, t in case.inputs().items()}
    inputs[name][7, 0, 3] = bad
    inputs = {n: t.requires_grad_() for n, t in inputs.items()}
    ours = results_and_gradients(inputs, case.ours(inputs))
    expected = results_and_gradients(inputs, case.reference(inputs, None))
    for key, value in ours.items():
        finite = expected[key].isfinite()
        assert torch.equal(value.isfinite(), finite), key
        torch.testing.assert_close(value[finite], expected[key][finite], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize(
    ("causal", "window"), [(False, (-1, -1)), (True, (-1, -1)), (True, (3, 0)), (False, (2, 1))]
)
def test_the_plain_path_follows_the_definition(
    causal: bool, window: tuple[int, int], alibi: bool
) -> None:
    """The functions of the reference with our signatures: models with every fusion off use them."""
    case = Case(
        1, 5, 9, 4, 2, 16, ((5, 9), (0, 0), (3, 3), (4, 12)), FP32, causal=causal, window=window
    )
    slopes = torch.tensor([0.5, 0.2, 0.1, 0.05], device=DEVICE) if alibi else None
    q, k, v = case.inputs().values()
    cu_q, cu_k = case.cu_seqlens()
    options: dict[str, Any] = {"causal": causal, "window_size": window, "alibi_slopes": slopes}
    out = reference.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 5, 12, **options)
    for i, j in itertools.pairwise(range(5)):
        rows, keys = slice(cu_q[i], cu_q[j]), slice(cu_k[i], cu_k[j])
        one = q[None, rows], k[None, keys], v[None, keys]
        expected, _ = reference.attention(*one, **options)
        torch.testing.assert_close(out[None, rows], expected)
        torch.testing.assert_close(reference.flash_attn_func(*one, **options), expected)


# --- Layouts --------------------------------------------------------------------------------------


def test_packed_tensors_and_strides() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 60, 3, 4, 32, device=DEVICE, dtype=BF16, requires_grad=True)
    dout = torch.randn(2, 60, 4, 32, device=DEVICE, dtype=BF16)
    q, k, v = (t.detach().contiguous().requires_grad_() for t in qkv.unbind(2))
    expected = attn.flash_attn_func(q, k, v, causal=True, backend=NATIVE)
    grads = torch.autograd.grad(expected, (q, k, v), dout)

    packed = attn.flash_attn_qkvpacked_func(qkv, causal=True, backend=NATIVE)
    assert torch.equal(packed, expected)
    assert torch.equal(torch.autograd.grad(packed, qkv, dout)[0], torch.stack(grads, 2))

    kv = qkv.detach()[:, :, 1:].requires_grad_()
    out = attn.flash_attn_kvpacked_func(q, kv, causal=True, backend=NATIVE)
    assert torch.equal(out, expected)
    assert torch.equal(torch.autograd.grad(out, kv, dout)[0], torch.stack(grads[1:], 2))

    # Heads before rows, and elements of a head apart.
    for order in ((0, 2, 1, 3), (3, 0, 1, 2), (0, 1, 3, 2)):
        back = tuple(order.index(i) for i in range(4))
        strided = [
            t.detach().permute(order).contiguous().permute(back).requires_grad_() for t in (q, k, v)
        ]
        out = attend(strided, causal=True, backend=NATIVE)
        assert torch.equal(out, expected)
        got = torch.autograd.grad(out, strided, dout.permute(order).contiguous().permute(back))
        assert all(torch.equal(a, b) for a, b in zip(got, grads))


@needs_gpu_memory(40)
def test_more_than_two_to_the_31_elements() -> None:
    torch.manual_seed(0)
    rows = 2**31 // (8 * 64) + 4096
    q, k, v = (
        torch.randn(1, rows, 8, 64, device=DEVICE, dtype=BF16, requires_grad=True) for _ in range(3)
    )
    out = attn.flash_attn_func(q, k, v, causal=True, window_size=(100, 0), backend=NATIVE)
    dout = torch.randn(1, 300, 8, 64, device=DEVICE, dtype=BF16)
    grads = torch.autograd.grad(out[:, -300:], (q, k, v), dout)
    tail = [t.detach()[:, -400:].requires_grad_() for t in (q, k, v)]
    small = attend(tail, causal=True, window_size=(100, 0), backend=NATIVE)
    torch.testing.assert_close(out[:, -300:], small[:, -300:], rtol=1e-2, atol=1e-2)
    for big, little in zip(grads, torch.autograd.grad(small[:, -300:], tail, dout)):
        torch.testing.assert_close(big[:, -300:], little[:, -300:], rtol=1e-2, atol=1e-2)


# --- Dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("varlen", [False, True], ids=["batch", "varlen"])
def test_attention_probabilities(varlen: bool) -> None:
    case = Case(
        2, 60, 80, 4, 2, 32, ((60, 80), (20, 20)) if varlen else (), FP32, dropout_p=0.4,
        softcap=8.0, alibi=True,
    )  # fmt: skip
    inputs = case.inputs()
    rng_state = next_rng_state()
    out, lse, signed = case.ours(inputs, return_attn_probs=True)
    assert signed.shape == (2, 4, 60, 80)
    row_q = row_k = 0
    for b, (seqlen_q, seqlen_k) in enumerate(case.sequences):
        keep = reference.attention_keep_mask(
            rng_state, 1, 4, seqlen_q, seqlen_k, case.dropout_p, row_q
        )[0]
        part = signed[b, :, :seqlen_q, :seqlen_k]
        assert ((part < 0) <= (keep == 0)).all()
        assert ((part > 0) <= (keep != 0)).all()
        torch.testing.assert_close(part.abs().sum(-1), torch.ones_like(part[..., 0]))
        v = inputs["v"][row_k : row_k + seqlen_k].repeat_interleave(2, dim=1)
        expected = torch.einsum("hij,jhd->ihd", part.clamp(min=0) / (1 - case.dropout_p), v)
        got = out[row_q : row_q + seqlen_q] if varlen else out[b]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        row_q, row_k = row_q + seqlen_q, row_k + seqlen_k
    assert lse.shape == ((4, 80) if varlen else (2, 4, 60))
    assert case.ours(inputs, dropout_p=0.0, return_attn_probs=True)[2].numel() == 0


def test_dropout_drops_the_right_share_and_follows_the_seed() -> None:
    case = Case(1, 256, 256, causal=False, dtype=FP32, dropout_p=0.3)
    inputs = case.inputs()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(case.ours(inputs, return_attn_probs=True)[2] < 0)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    # 131,072 draws: a standard deviation is 0.0013.
    assert abs(runs[0].float().mean().item() - 0.3) < 0.007
