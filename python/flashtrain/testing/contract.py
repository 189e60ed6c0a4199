"""What holds for every op, whatever it computes: checks of one op each, on samples of its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from flashtrain.testing.devices import DEVICE

Shapes = list[tuple[int, ...]]
Inputs = dict[str, Tensor]


# --- Compiled -------------------------------------------------------------------------------------


def _compiled_results(function: Callable[..., Any], leaves: list[Tensor]) -> list[Tensor]:
    """Results, the tensors after the call, and the gradients of both."""
    inputs = [leaf * 1.0 for leaf in leaves]
    results = function(*inputs)
    results = list(results) if isinstance(results, tuple) else [results]
    results = [*(t for t in results if t.requires_grad), *inputs]
    weights = [torch.linspace(-1, 1, t.numel()).view_as(t) for t in results]
    values = [t.detach().clone() for t in results]  # backward may overwrite them
    return [*values, *torch.autograd.grad(results, leaves, weights)]


def assert_compiled_as_eager(
    op: Callable[..., Any], shapes: Shapes, *, intermediate: bool, dynamic: bool
) -> None:
    """On tensors that enter the graph, or on `intermediate` ones, which the graph computes.

    An op that writes to an argument, or to what was saved, may be compiled rightly for one of the
    two alone: results, gradients and all that was written must be those of eager calls.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]

    def call(*tensors: Tensor) -> Any:
        return op(*(t.sin() for t in tensors) if intermediate else tensors)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(_compiled_results(compiled, leaves), _compiled_results(call, leaves))


# --- Fake tensors ---------------------------------------------------------------------------------


def _results(function: Callable[[Inputs], Any], inputs: Inputs) -> list[Tensor]:
    """What the op returns, and the gradients."""
    results = function(inputs)
    results = [t for t in (results if isinstance(results, tuple) else (results,)) if t is not None]
    sums = [t.sum() for t in results if t.requires_grad]
    leaves = [t for t in inputs.values() if t.requires_grad]
    gradients = torch.autograd.grad(sums, leaves, allow_unused=True) if sums else ()
    return [*results, *(g for g in gradients if g is not None)]


def assert_fake_in_fake_out(op: Callable[[Inputs], Any], inputs: Callable[[str], Inputs]) -> None:
    """Results and gradients of the kind, shapes and dtypes as of real ones.

    Args:
      op: calls the op.
      inputs: makes the op's tensors on a device, which it is told by name.
    """
    expected = _results(op, inputs("cpu"))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    real = inputs("cpu")
    fake = {key: mode.from_tensor(value) for key, value in real.items()}
    with mode:
        inside = _results(op, fake)
        of_real = _results(op, real)
    outside = _results(op, fake)
    meta = _results(op, inputs("meta"))
    for results, kind in ((inside, "fake"), (of_real, "fake"), (outside, "fake"), (meta, "meta")):
        assert len(results) == len(expected)
        for result, real_one in zip(results, expected):
            assert result.is_meta if kind == "meta" else isinstance(result, FakeTensor)
            assert (result.shape, result.dtype) == (real_one.shape, real_one.dtype)


# --- Views with a negative bit --------------------------------------------------------------------


def assert_negative_views_count_as_shown(
    op: Callable[..., Tensor],
    shapes: Shapes,
    *,
    dtype: torch.dtype = torch.float32,
    no_grad: tuple[int, ...] = (),
    in_place: bool = False,
) -> None:
    """Forward and backward, of inputs and of the gradient; `no_grad` are places of the inputs."""
    torch.manual_seed(0)
    stored = [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]

    def run(tensors: list[Tensor], negative_grad: bool) -> list[Tensor]:
        leaves = [t.detach().requires_grad_(i not in no_grad) for i, t in enumerate(tensors)]
        out = op(*(t * 1.0 for t in leaves) if in_place else leaves)
        grad = torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out).to(out.dtype)
        grad = torch._neg_view(grad) if negative_grad else -grad
        wanted = [t for t in leaves if t.requires_grad]
        return [out.detach(), *torch.autograd.grad(out, wanted, grad)]

    expected = run([-t for t in stored], False)
    torch.testing.assert_close(run([torch._neg_view(t) for t in stored], False), expected)
    torch.testing.assert_close(run([-t for t in stored], True), expected)
    with torch.no_grad():
        out = op(*(torch._neg_view(t) for t in stored))
    torch.testing.assert_close(out, expected[0])
