"""What the layer_norm tests share: a case, its inputs, and ours held against torch and fp64."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from flashtrain.ops import layer_norm as ln
from flashtrain.ops.reference import layer_norm as reference
from flashtrain.testing import tolerances
from flashtrain.testing.devices import DEVICE

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
WEIGHT_GRADS = ("weight", "bias", "layerscale")


@dataclasses.dataclass(frozen=True)
class Case:
    shape: tuple[int, ...] = (17, 192)
    dtype: torch.dtype = BF16  # of x0
    residual: torch.dtype | None = BF16
    weight: torch.dtype = FP32
    bias: bool = True
    dropout_p: float = 0.0
    rowscale: bool = False
    layerscale: bool = False
    prenorm: bool = True
    residual_in_fp32: bool = False
    rms: bool = False
    epsilon: float = 1e-5
    mean: float = 0.5  # of x0's elements, whose standard deviation is 1

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        """Leaves that require grad, but for rowscale; None ones are left out."""
        torch.manual_seed(seed)
        cols = self.shape[-1]

        def randn(shape, dtype, scale=1.0, shift=0.0):
            values = torch.randn(shape, device=DEVICE) * scale + shift
            return values.to(dtype).requires_grad_()

        inputs = {"x0": randn(self.shape, self.dtype, shift=self.mean)}
        if self.residual is not None:
            inputs["residual"] = randn(self.shape, self.residual)
        inputs["weight"] = randn(cols, self.weight, scale=0.3, shift=1.0)
        if self.bias:
            inputs["bias"] = randn(cols, self.weight)
        if self.rowscale:
            inputs["rowscale"] = randn(self.shape[:-1], self.dtype).detach()
        if self.layerscale:
            inputs["layerscale"] = randn(cols, self.weight, scale=0.5)
        return inputs

    def ours(self, inputs: dict[str, Tensor], **changes) -> tuple[Tensor, ...]:
        function = ln.dropout_add_rms_norm if self.rms else ln.dropout_add_layer_norm
        options = {
            "residual": None,
            "bias": None,
            "dropout_p": self.dropout_p,
            "epsilon": self.epsilon,
            "prenorm": self.prenorm,
            "residual_in_fp32": self.residual_in_fp32,
        }
        outputs = function(**(options | inputs | changes))
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def reference(
        self, inputs: dict[str, Tensor], compute_dtype: torch.dtype | None, mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        out, residual_out, _ = reference.add_norm(
            **({"residual": None, "bias": None} | inputs),
            epsilon=self.epsilon,
            dropout_p=self.dropout_p,
            keep_mask=mask,
            residual_in_fp32=self.residual_in_fp32,
            is_rms_norm=self.rms,
            compute_dtype=compute_dtype,
        )
        return (out, residual_out) if self.prenorm else (out,)


def results_and_gradients(
    inputs: dict[str, Tensor], outputs: tuple[Tensor, ...], seed: int = 1
) -> dict[str, Tensor]:
    """z, x and d<input> for each input, for output gradients that depend on the seed alone."""
    torch.manual_seed(seed)
    out_grads = [torch.randn(out.shape, device=DEVICE).to(BF16).to(out.dtype) for out in outputs]
    leaves = {name: t for name, t in inputs.items() if t.requires_grad}
    grads = torch.autograd.grad(outputs, list(leaves.values()), out_grads)
    named = dict(zip(("z", "x"), (out.detach() for out in outputs)))
    return named | {f"d{name}": grad for name, grad in zip(leaves, grads)}


def check(case: Case) -> None:
    """Forward and backward of `case` against torch and the exact result."""

    def draw(seed: int) -> tolerances.Draw:
        inputs = case.inputs(seed)
        outputs, mask = case.ours(inputs), None
        if case.dropout_p > 0.0:
            outputs = case.ours(inputs, return_dropout_mask=True)
            outputs, mask = outputs[:-1], outputs[-1]
        ours = results_and_gradients(inputs, outputs, seed + 1)
        in_torch = results_and_gradients(inputs, case.reference(inputs, None, mask), seed + 1)
        doubles = {
            name: t.detach().double().requires_grad_(t.requires_grad) for name, t in inputs.items()
        }
        right = case.reference(doubles, torch.float64, mask)
        exact = results_and_gradients(doubles, right, seed + 1)
        return ours, in_torch, exact

    ours, in_torch, exact = tolerances.pooled(draw)
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        k = tolerances.K_DROPOUT if case.dropout_p > 0.0 else tolerances.K_OUTPUT
        if name[1:] in WEIGHT_GRADS:
            k = max(tolerances.K_WEIGHT_GRAD, k)
        tolerances.assert_as_exact_as_torch(name, value, in_torch[name], exact[name], k)


def assert_same_numbers(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal but for the order of sums, which may follow strides, row counts and what is asked for.

    A flip of one rounding to bfloat16 is 2**-7 at most; a float32 sum moves by far less.
    """
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        rtol = 1e-4 if value.dtype == FP32 else 2**-7
        torch.testing.assert_close(results[name], value, rtol=rtol, atol=1e-4, msg=name)
