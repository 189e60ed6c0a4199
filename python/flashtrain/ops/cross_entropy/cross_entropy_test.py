"""cross_entropy against its reference: sizes, dtypes, options, layouts, infinities."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flashtrain.ops.cross_entropy import CrossEntropyLoss, cross_entropy_loss
from flashtrain.ops.cross_entropy.cases import (
    BF16,
    FP16,
    FP32,
    IGNORE,
    Case,
    assert_losses_close,
    check,
    row_gradients,
)
from flashtrain.testing.devices import DEVICE, needs_gpu_memory, poisoned_memory
from flashtrain.testing.shapes import COLS, COLS_HUGE, ROWS


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with poisoned_memory():
        yield


# --- Numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("rows", ROWS)
def test_sizes(rows: int, cols: int) -> None:
    check(Case((rows, cols), FP32 if rows % 2 else BF16))


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("cols", [*COLS_HUGE, 50257, 50304, 128256])
def test_vocabularies(cols: int, dtype: torch.dtype) -> None:
    check(Case((5, cols), dtype, inplace_backward=cols % 2 == 0))


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize(
    ("smoothing", "scale", "z"), [*itertools.product((0.0, 0.1, 0.9), (1.0, 0.7), (0.0, 1e-2))]
)
def test_options(smoothing, scale, z, dtype, inplace) -> None:
    for shape, vocab_size in (((11, 1000), None), ((2, 3, 264), 257)):
        check(
            Case(
                shape,
                dtype,
                torch.int32 if scale == 1.0 else torch.int64,
                label_smoothing=smoothing,
                logit_scale=scale,
                lse_square_scale=z,
                vocab_size=vocab_size,
                inplace_backward=inplace,
            )
        )


def test_against_torch_itself() -> None:
    logits, labels = Case((33, 517), FP32).inputs()
    for smoothing in (0.0, 0.2):
        loss = CrossEntropyLoss(label_smoothing=smoothing)(logits, labels)
        expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits)
        )


def test_reference_passes_gradcheck() -> None:
    labels = torch.tensor([1, IGNORE, 4])
    case = Case((3, 7), label_smoothing=0.2, logit_scale=0.5, lse_square_scale=0.1, vocab_size=6)
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: case.reference(x, labels, torch.float64)[0], (logits,)
    )


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_large_logits(dtype: torch.dtype) -> None:
    logits = torch.randn(9, 1000, device=DEVICE).mul(1e4).to(dtype)
    labels = torch.arange(9, device=DEVICE)
    losses, _ = cross_entropy_loss(logits, labels)
    assert_losses_close(losses, F.cross_entropy(logits.double(), labels, reduction="none"))


@pytest.mark.parametrize("cols", [16, 3000, 60000])
def test_minus_infinity_anywhere(cols: int) -> None:
    """Masked classes: the first ones, every other, all but one."""
    torch.manual_seed(0)
    logits = torch.randn(4, cols, device=DEVICE)
    logits[0, : cols - 2] = -torch.inf
    logits[1, ::2] = -torch.inf
    logits[2, 1:] = -torch.inf
    labels = torch.tensor([cols - 1, 1, 0, 3], device=DEVICE)
    logits.requires_grad_()
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none")
    losses, _ = cross_entropy_loss(logits, labels)
    assert_losses_close(losses.detach(), expected.detach())
    dlosses = row_gradients(losses)
    torch.testing.assert_close(
        torch.autograd.grad(losses, logits, dlosses)[0].double(),
        torch.autograd.grad(expected, exact, dlosses.double())[0],
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_masked_label_costs_infinitely_much() -> None:
    logits = torch.zeros(2, 5, device=DEVICE)
    logits[0, 3] = -torch.inf
    losses, _ = cross_entropy_loss(logits, torch.tensor([3, 3], device=DEVICE))
    assert losses[0] == torch.inf
    assert losses[1].isfinite()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_stay_in_their_rows(value: float) -> None:
    logits, labels = Case((4, 100), FP32).inputs()
    labels[:] = 5
    with torch.no_grad():
        logits[2, slice(None) if value == -float("inf") else 33] = value
    losses, _ = cross_entropy_loss(logits, labels)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    others = [0, 1, 3]
    assert losses[2].isnan()
    assert grad[2].isnan().all()
    expected = F.cross_entropy(logits[others], labels[others], reduction="none")
    torch.testing.assert_close(losses[others], expected)
    assert grad[others].isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored(reduction: str) -> None:
    logits = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    labels = torch.full((3,), IGNORE, device=DEVICE)
    loss, z_loss = CrossEntropyLoss(
        reduction=reduction, lse_square_scale=0.1, label_smoothing=0.1, return_z_loss=True
    )(logits, labels)
    assert (loss == 0).all()
    assert (z_loss == 0).all()
    loss.sum().backward()
    assert (logits.grad == 0).all()


def test_padding_is_neither_read_nor_left_unwritten() -> None:
    for inplace in (False, True):
        logits, labels = Case((3, 64), FP32, vocab_size=50).inputs()
        with torch.no_grad():
            logits[:, 50:] = torch.nan
        loss = CrossEntropyLoss(vocab_size=50, inplace_backward=inplace)(logits, labels)
        expected = F.cross_entropy(logits[:, :50], labels)
        torch.testing.assert_close(loss, expected)
        (expected_grad,) = torch.autograd.grad(expected, logits)
        (grad,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(grad[:, :50], expected_grad[:, :50])
        assert (grad[:, 50:] == 0).all()


def test_labels_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(2, 3, 10, device=DEVICE, requires_grad=True)
    for label in (9, 10, -1):
        labels = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
        labels[1, 0] = label
        if DEVICE.type == "cuda":
            losses, _ = cross_entropy_loss(logits, labels, vocab_size=9)
            (grad,) = torch.autograd.grad(losses.sum(), logits)
            assert losses.isnan().nonzero().tolist() == [[1, 0]]
            assert grad[..., :9].isnan().all(-1).nonzero().tolist() == [[1, 0]]
            monkeypatch.setenv("FLASHTRAIN_CHECK_LABELS", "1")
        with pytest.raises(ValueError, match=rf"is {label}; a label must be in \[0, 9\)"):
            cross_entropy_loss(logits, labels, vocab_size=9)
        monkeypatch.delenv("FLASHTRAIN_CHECK_LABELS", raising=False)


def test_ignore_index_may_be_a_class() -> None:
    check(Case((20, 30), FP32, ignore_index=7))


# --- Shapes and strides ---------------------------------------------------------------------------

_LAYOUTS = {
    "rows apart": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "odd start": lambda t: torch.cat([t[..., :1], t], -1)[..., 1:],
    "columns apart": lambda t: torch.stack([t, t], -1)[..., 0],
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every other row": lambda t: torch.stack([t, t], 1).flatten(0, 1)[::2],
}


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("layout", _LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 72), (4, 5, 133)])
def test_layouts(layout: str, shape: tuple[int, ...], inplace: bool) -> None:
    case = Case(shape, BF16)
    logits, labels = case.inputs()
    losses, _ = case.ours(logits, labels)
    dlosses = row_gradients(losses)
    (grad,) = torch.autograd.grad(losses, logits, dlosses)
    moved = _LAYOUTS[layout](logits.detach()).requires_grad_()
    results, _ = cross_entropy_loss(
        moved, labels.repeat_interleave(2, -1)[..., ::2], inplace_backward=inplace
    )
    torch.testing.assert_close(results, losses, rtol=1e-6, atol=1e-6)
    (moved_grad,) = torch.autograd.grad(results, moved, torch.stack([dlosses] * 2, -1)[..., 0])
    torch.testing.assert_close(moved_grad, grad, rtol=2**-7, atol=1e-6)


def test_one_dimension() -> None:
    logits = torch.randn(50, device=DEVICE, requires_grad=True)
    label = torch.tensor(3, device=DEVICE)
    losses, _ = cross_entropy_loss(logits, label)
    expected = F.cross_entropy(logits, label)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(
        torch.autograd.grad(losses, logits), torch.autograd.grad(expected, logits)
    )


@needs_gpu_memory(40)
def test_more_than_two_to_the_31_elements() -> None:
    cols = 50304
    rows = 2**31 // cols + 3
    torch.manual_seed(0)
    logits = torch.randn(rows, cols, device=DEVICE, dtype=BF16).requires_grad_()
    labels = torch.randint(0, cols, (rows,), device=DEVICE)
    few = logits.detach()[-5:].clone().requires_grad_()
    few_losses, _ = cross_entropy_loss(few, labels[-5:])
    (few_grad,) = torch.autograd.grad(few_losses.sum(), few)
    losses, _ = cross_entropy_loss(logits, labels, inplace_backward=True)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert torch.equal(losses[-5:], few_losses)
    assert torch.equal(grad[-5:], few_grad)


# --- precomputed_lse, reductions ------------------------------------------------------------------


def test_precomputed_lse() -> None:
    logits, labels = Case((9, 300), FP32).inputs()
    lse = torch.logsumexp(logits, -1).detach()
    expected, _ = cross_entropy_loss(logits, labels, lse_square_scale=0.1)
    losses, _ = cross_entropy_loss(logits, labels, lse, lse_square_scale=0.1)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(
        torch.autograd.grad(losses.sum(), logits), torch.autograd.grad(expected.sum(), logits)
    )
    # It is taken as given, and only where it can be the scaled logits'.
    shifted, _ = cross_entropy_loss(logits, labels, lse + 1.0)
    plain, _ = cross_entropy_loss(logits, labels)
    torch.testing.assert_close(shifted, torch.where(labels == IGNORE, 0.0, plain + 1.0))
    different: tuple[dict[str, Any], ...] = ({"logit_scale": 0.5}, {"label_smoothing": 0.1})
    for options in different:
        torch.testing.assert_close(
            cross_entropy_loss(logits, labels, lse + 1.0, **options),
            cross_entropy_loss(logits, labels, **options),
        )


def test_reductions() -> None:
    logits, labels = Case((2, 10, 31), FP32).inputs()
    losses, z_losses = cross_entropy_loss(logits, labels, lse_square_scale=0.01)
    kept = int((labels != IGNORE).sum())
    for reduction, expected in (
        ("none", (losses, z_losses)),
        ("sum", (losses.sum(), z_losses.sum())),
        ("mean", (losses.sum() / kept, z_losses.sum() / kept)),
    ):
        module = CrossEntropyLoss(reduction=reduction, lse_square_scale=0.01, return_z_loss=True)
        results = module(logits, labels)
        torch.testing.assert_close(results, expected)
        assert not results[1].requires_grad
    assert CrossEntropyLoss()(logits, labels).dim() == 0


def test_an_ignored_label_beyond_32_bits_is_not_taken_for_its_low_ones() -> None:
    """torch compares an int32 tensor with the number's low bits, here 1."""
    logits, labels = Case((6, 16), FP32).inputs()
    labels = torch.arange(6, device=labels.device, dtype=torch.int32) % 2
    expected = CrossEntropyLoss()(logits, labels)
    assert torch.equal(CrossEntropyLoss(ignore_index=2**32 + 1)(logits, labels), expected)
