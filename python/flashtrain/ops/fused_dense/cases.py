"""What the fused_dense tests share: a case, its inputs, and ours held against torch and fp64."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtrain.ops import fused_dense as fd
from flashtrain.ops.fused_dense import autotune, kernels
from flashtrain.ops.reference import fused_dense as reference
from flashtrain.testing import tolerances
from flashtrain.testing.devices import DEVICE

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
INPUTS = ("x", "weight1", "weight2", "bias1", "bias2")
# Ways to compute: the plain one, and cuBLASLt's whether or not it is faster.
PATHS = ("plain", "fused") if DEVICE.type == "cuda" else ("plain",)


@contextlib.contextmanager
def forced(path: str) -> Iterator[None]:
    """Takes `path` wherever it can compute the product."""
    choose = autotune._first if path == "fused" else lambda product, operands: None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autotune, "choose", choose)
        assert kernels.autotune is autotune
        yield


@dataclasses.dataclass(frozen=True)
class Case:
    leading: tuple[int, ...] = (17,)
    features: tuple[int, int, int] = (64, 128, 48)  # in, hidden, out
    dtype: torch.dtype = BF16
    activation: str = "gelu_approx"
    bias1: bool = True
    bias2: bool = True
    checkpoint_lvl: int = 0
    return_residual: bool = False

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        """Leaves that require grad; None ones are left out."""
        torch.manual_seed(seed)
        size_in, hidden, size_out = self.features

        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, device=DEVICE) * scale).to(self.dtype).requires_grad_()

        inputs = {
            "x": randn(*self.leading, size_in),
            "weight1": randn(hidden, size_in, scale=size_in**-0.5),
            "weight2": randn(size_out, hidden, scale=hidden**-0.5),
        }
        if self.bias1:
            inputs["bias1"] = randn(hidden)
        if self.bias2:
            inputs["bias2"] = randn(size_out)
        return inputs

    def ours(self, inputs: dict[str, Tensor], **changes) -> tuple[Tensor, ...]:
        options = {
            "activation": self.activation,
            "checkpoint_lvl": self.checkpoint_lvl,
            "return_residual": self.return_residual,
        }
        outputs = fd.fused_mlp_func(**(inputs | options | changes))
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def reference(
        self, inputs: dict[str, Tensor], compute_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, ...]:
        arguments = {"bias1": None, "bias2": None} | inputs
        out = reference.fused_mlp(
            **arguments, activation=self.activation, compute_dtype=compute_dtype
        )
        return (out, inputs["x"]) if self.return_residual else (out,)


def results_and_gradients(
    inputs: dict[str, Tensor], outputs: tuple[Tensor, ...], seed: int = 1
) -> dict[str, Any]:
    """out and d<input> for each leaf, for output gradients that depend on the seed alone."""
    torch.manual_seed(seed)
    out_grads = [torch.randn(out.shape, device=DEVICE).to(BF16).to(out.dtype) for out in outputs]
    leaves = {name: t for name, t in inputs.items() if t.requires_grad}
    grads = torch.autograd.grad(outputs, list(leaves.values()), out_grads, allow_unused=True)
    named = dict(zip(("out", "residual"), (out.detach() for out in outputs)))
    return named | {f"d{name}": grad for name, grad in zip(leaves, grads)}


def in_double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in inputs.items()}


def assert_as_exact_as_torch(
    ours: dict[str, Tensor], in_torch: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        weight_grad = name.startswith(("dweight", "dbias"))
        k = tolerances.K_WEIGHT_GRAD if weight_grad else tolerances.K_OUTPUT
        tolerances.assert_as_exact_as_torch(name, value, in_torch[name], exact[name], k)


def check(case: Case) -> None:
    """Forward and backward of `case` against torch and the exact result, by every path."""
    for path in PATHS:

        def draw(seed: int, path: str = path) -> tolerances.Draw:
            inputs = case.inputs(seed)
            with forced(path):
                ours = results_and_gradients(inputs, case.ours(inputs), seed + 1)
            in_torch = results_and_gradients(inputs, case.reference(inputs), seed + 1)
            doubles = in_double(inputs)
            right = case.reference(doubles, torch.float64)
            return ours, in_torch, results_and_gradients(doubles, right, seed + 1)

        assert_as_exact_as_torch(*tolerances.pooled(draw))
