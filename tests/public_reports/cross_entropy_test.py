"""What users of other fused cross entropies have reported, held against ours."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from flashtrain.ops.cross_entropy import cross_entropy_loss
from flashtrain.ops.linear_cross_entropy import linear_cross_entropy

LABELS = torch.tensor([3, -100, 0, 16, 5])


@pytest.fixture(name="inputs")
def _inputs() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(5, 8), torch.randn(17, 8), torch.randn(17)]


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(
    "needed", [m for m in itertools.product((False, True), repeat=3) if any(m)]
)
def test_only_some_inputs_need_gradients(
    inputs: list[torch.Tensor], needed: tuple[bool, ...], wrapped: bool
) -> None:
    """fla-org/flash-linear-attention#1253: a frozen head."""
    mine = [t.clone().requires_grad_(need) for t, need in zip(inputs, needed)]

    def call(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, LABELS, bias)

    loss = checkpoint(call, *mine, use_reentrant=False) if wrapped else call(*mine)
    (3 * loss).backward()
    exact = [t.double().requires_grad_() for t in inputs]
    (3 * F.cross_entropy(F.linear(*exact), LABELS)).backward()
    for ours, right, need in zip(mine, exact, needed):
        assert (ours.grad is not None) == need
        if need:
            torch.testing.assert_close(ours.grad.double(), right.grad, rtol=1e-5, atol=1e-6)


def test_no_reduction_has_no_silent_zero_gradient(inputs: list[torch.Tensor]) -> None:
    """linkedin/Liger-Kernel#968: reduction="none" gave wrong gradients."""
    hidden, weight, _ = inputs
    with pytest.raises(ValueError, match="reduction: got 'none' and an input that requires grad"):
        linear_cross_entropy(hidden.requires_grad_(), weight, LABELS, reduction="none")


def test_a_vocabulary_that_is_no_multiple_of_a_block() -> None:
    """verl-project/verl#2899; what lies in the padding is not read."""
    torch.manual_seed(0)
    classes, columns = 100_277, 100_352
    logits = 3 * torch.randn(4, columns)
    logits[:, classes:] = float("nan")
    logits.requires_grad_()
    labels = torch.tensor([0, classes - 1, -100, 70_000])
    losses, _ = cross_entropy_loss(logits, labels, label_smoothing=0.1, vocab_size=classes)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    exact = logits.detach()[:, :classes].double().requires_grad_()
    right = F.cross_entropy(exact, labels, label_smoothing=0.1, reduction="sum")
    (expected,) = torch.autograd.grad(right, exact)
    torch.testing.assert_close(gradient[:, :classes].double(), expected, rtol=1e-5, atol=1e-6)
    assert not gradient[:, classes:].any()


def test_a_batch_without_labels(inputs: list[torch.Tensor]) -> None:
    hidden, weight, _ = inputs
    assert linear_cross_entropy(hidden, weight, torch.full((5,), -100)) == 0.0
