"""What the tests of both cross entropies share: a case, its inputs, and ours against fp64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from flashtrain.ops.cross_entropy import cross_entropy_loss
from flashtrain.ops.linear_cross_entropy import linear_cross_entropy
from flashtrain.ops.reference import cross_entropy as reference
from flashtrain.testing import tolerances
from flashtrain.testing.devices import DEVICE

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
IGNORE = -100


@dataclasses.dataclass(frozen=True)
class _Options:
    shape: tuple[int, ...] = (17, 192)
    dtype: torch.dtype = BF16
    labels: torch.dtype = torch.int64
    label_smoothing: float = 0.0
    logit_scale: float = 1.0
    lse_square_scale: float = 0.0
    vocab_size: int | None = None
    ignore_index: int = IGNORE

    def options(self) -> dict[str, Any]:
        names = (
            "label_smoothing", "logit_scale", "lse_square_scale", "ignore_index", "vocab_size",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def random_labels(self, shape: tuple[int, ...], classes: int) -> Tensor:
        """Labels, every fifth of them ignored."""
        labels = torch.randint(0, self.vocab_size or classes, shape, device=DEVICE)
        labels.view(-1)[::5] = self.ignore_index
        return labels.to(self.labels)


@dataclasses.dataclass(frozen=True)
class Case(_Options):
    inplace_backward: bool = False

    def inputs(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Logits, a leaf that requires grad, and labels."""
        torch.manual_seed(seed)
        logits = (torch.randn(self.shape, device=DEVICE) * 3.0).to(self.dtype).requires_grad_()
        return logits, self.random_labels(self.shape[:-1], self.shape[-1])

    def ours(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return cross_entropy_loss(
            logits, labels, inplace_backward=self.inplace_backward, **self.options()
        )

    def reference(
        self, logits: Tensor, labels: Tensor, compute_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        return reference.cross_entropy_loss(
            logits, labels, compute_dtype=compute_dtype, **self.options()
        )


def assert_losses_close(ours: Tensor, exact: Tensor) -> None:
    assert ours.dtype is FP32
    torch.testing.assert_close(ours.double(), exact.double(), rtol=1e-5, atol=1e-6)


def row_gradients(losses: Tensor, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(losses.shape, device=DEVICE).to(losses.dtype)


def check(case: Case) -> None:
    """Losses, z-losses and the gradient of `case` against torch and the exact result."""
    logits, labels = case.inputs()
    doubles = logits.detach().double().requires_grad_()
    exact, exact_z = case.reference(doubles, labels, torch.float64)
    in_torch, _ = case.reference(logits, labels)
    dlosses = row_gradients(exact.float())
    (exact_grad,) = torch.autograd.grad(exact, doubles, dlosses.double())
    (torch_grad,) = torch.autograd.grad(in_torch, logits, dlosses)

    losses, z_losses = case.ours(logits, labels)
    assert_losses_close(losses.detach(), exact.detach())
    assert_losses_close(z_losses, exact_z)
    (grad,) = torch.autograd.grad(losses, logits, dlosses)
    if case.inplace_backward and logits.numel():
        assert grad.data_ptr() == logits.data_ptr()
    tolerances.assert_as_exact_as_torch(
        "dlogits", grad, torch_grad, exact_grad, tolerances.K_OUTPUT
    )


@dataclasses.dataclass(frozen=True)
class LinearCase(_Options):
    """shape is [..., D]; `classes` the rows of weight."""

    classes: int = 40
    weight: torch.dtype | None = None  # None: dtype
    bias: bool = False
    reduction: str = "mean"

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        weight_dtype = self.weight or self.dtype
        depth = self.shape[-1]

        def leaf(*shape: int, scale: float, dtype: torch.dtype) -> Tensor:
            return (torch.randn(shape, device=DEVICE) * scale).to(dtype).requires_grad_()

        tensors = {
            "hidden": leaf(*self.shape, scale=1.0, dtype=self.dtype),
            "weight": leaf(self.classes, depth, scale=2.0 / depth**0.5, dtype=weight_dtype),
        }
        if self.bias:
            tensors["bias"] = leaf(self.classes, scale=0.5, dtype=weight_dtype)
        return tensors

    def labels_of(self) -> Tensor:
        return self.random_labels(self.shape[:-1], self.classes)

    def ours(
        self, tensors: dict[str, Tensor], labels: Tensor, **changes: Any
    ) -> tuple[Tensor, Tensor]:
        options = self.options() | {"reduction": self.reduction} | changes
        return linear_cross_entropy(**tensors, labels=labels, return_z_loss=True, **options)

    def reference(
        self,
        tensors: dict[str, Tensor],
        labels: Tensor,
        compute_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        return reference.linear_cross_entropy(
            **tensors, labels=labels, reduction=self.reduction, compute_dtype=compute_dtype,
            **self.options(),
        )  # fmt: skip


def check_linear(case: LinearCase) -> None:
    """Loss, z-loss and all gradients of `case` against torch and the exact result."""
    # By another than a power of two, the gradient of hidden is rounded once more.
    dloss = torch.tensor(0.5, device=DEVICE)

    def run(function, inputs: dict[str, Tensor], *args) -> dict[str, Tensor]:
        loss, z_loss = function(inputs, *args)
        grads = torch.autograd.grad(loss, list(inputs.values()), dloss.to(loss.dtype))
        # A sum is judged as the mean is: of 30 rows it has no fp32 neighbour within 1e-5.
        losses = {"loss": loss.detach() / rows, "z_loss": z_loss / rows}
        return losses | {f"d{name}": grad for name, grad in zip(inputs, grads)}

    def draw(seed: int) -> tolerances.Draw:
        tensors, labels = case.tensors(seed), case.labels_of()
        doubles = {n: t.detach().double().requires_grad_() for n, t in tensors.items()}
        return (
            run(case.ours, tensors, labels),
            run(case.reference, tensors, labels),
            run(case.reference, doubles, labels, torch.float64),
        )

    rows = max(math.prod(case.shape[:-1]), 1) if case.reduction == "sum" else 1
    # Of one number, as the losses are; but torch rounds the same logits to their dtype.
    ours, in_torch, exact = tolerances.pooled(draw, but_for=("loss", "z_loss"))
    for name, value in ours.items():
        k = tolerances.K_WEIGHT_GRAD if name in ("dweight", "dbias") else tolerances.K_OUTPUT
        tolerances.assert_as_exact_as_torch(name, value, in_torch[name], exact[name], k)
