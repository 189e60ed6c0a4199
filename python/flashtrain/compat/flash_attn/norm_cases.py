"""What the tests of the norms share: ours held against torch and fp64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashtrain.ops.layer_norm.cases import BF16, WEIGHT_GRADS
from flashtrain.testing import tolerances
from flashtrain.testing.devices import DEVICE

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def leaves_of(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    leaves = {}
    for name, (shape, dtype) in shapes.items():
        shift = 1.0 if name.startswith("weight") else 0.25
        leaves[name] = (torch.randn(shape, device=DEVICE) + shift).to(dtype).requires_grad_()
    return leaves


def _outputs_and_gradients(
    leaves: dict[str, Tensor], outputs: list[Tensor], seed: int
) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    grads = [torch.randn(out.shape, device=DEVICE).to(BF16).to(out.dtype) for out in outputs]
    found = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True)
    named = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    return named | {
        f"d{name}": torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), found)
    }


def hold_against_torch(
    shapes: Shapes,
    run: Callable[[dict[str, Tensor]], tuple[list[Tensor], Callable[..., list[Tensor]]]],
    k: float,
) -> None:
    """`run(leaves)` gives our outputs, and a function of leaves and compute_dtype that gives the
    same outputs in plain torch."""

    def draw(seed: int) -> tolerances.Draw:
        leaves = leaves_of(shapes, seed)
        ours, expression = run(leaves)
        doubles = {n: t.detach().double().requires_grad_() for n, t in leaves.items()}
        in_torch, exact = expression(leaves, None), expression(doubles, torch.float64)
        assert len(ours) == len(in_torch) == len(exact)
        return (
            _outputs_and_gradients(leaves, ours, seed + 1),
            _outputs_and_gradients(leaves, in_torch, seed + 1),
            _outputs_and_gradients(doubles, exact, seed + 1),
        )

    ours, in_torch, exact = tolerances.pooled(draw)
    for name, value in ours.items():
        of_weight = name[1:].rstrip("01") in WEIGHT_GRADS
        factor = max(tolerances.K_WEIGHT_GRAD, k) if of_weight else k
        tolerances.assert_as_exact_as_torch(name, value, in_torch[name], exact[name], factor)
