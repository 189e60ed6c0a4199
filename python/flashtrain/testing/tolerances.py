"""The two-sided error rule by which kernels are judged.

    max|ours - exact| <= k * max|torch - exact| + a

`exact` is computed in float64 from the same inputs, `torch` by the plain torch expression in the
dtypes of ours. So a kernel may be as wrong as torch is, times k, and no more: the bound follows the
data and the dtype, and is not a constant somebody tuned. (The rule is that of flash-attention's
tests.)

The largest error of a few numbers is a matter of luck: torch may hit them all, and on another CPU,
whose sums go in another order, miss them. So `pooled` repeats a case that has few results with
other inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor

K_OUTPUT = 2.0  # outputs and gradients of activations
K_DROPOUT = 4.0  # the same where dropout is on
K_WEIGHT_GRAD = 3.0

# Of each result. With one, the rule failed by chance for 5 of 100 inputs.
ENOUGH_NUMBERS = 64

Results = dict[str, Tensor]
Draw = tuple[Results, Results, Results]  # ours, torch's, exact


def absolute_tolerance(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 1e-4


def max_error(value: Tensor, exact: Tensor) -> float:
    """max|value - exact| in float64; 0 for empty tensors."""
    if value.numel() == 0:
        return 0.0
    return (value.double() - exact.double()).abs().max().item()


def assert_as_exact_as_torch(
    name: str, ours: Tensor, torch_result: Tensor, exact: Tensor, k: float
) -> None:
    """The rule above, after shape, dtype and finiteness.

    Args:
      name: what is compared, for the message.
      ours: the kernel's result; none of its elements may be NaN or infinite.
      torch_result: the plain torch expression's, in the same dtypes.
      exact: float64.
      k: K_OUTPUT, K_DROPOUT or K_WEIGHT_GRAD.
    """
    assert ours.shape == exact.shape, f"{name}: shape {ours.shape}, expected {exact.shape}"
    assert ours.dtype == torch_result.dtype, (
        f"{name}: dtype {ours.dtype}, expected {torch_result.dtype}"
    )
    assert exact.dtype == torch.float64, f"{name}: the exact result must be float64"
    bad = ~torch.isfinite(ours)
    assert not bad.any(), (
        f"{name}: {int(bad.sum())} of {ours.numel()} elements are not finite, first at "
        f"{bad.nonzero()[0].tolist()}"
    )
    error = max_error(ours, exact)
    torch_error = max_error(torch_result, exact)
    bound = k * torch_error + absolute_tolerance(ours.dtype)
    assert error <= bound, (
        f"{name}: max error {error:.3e} > {bound:.3e} = {k} * {torch_error:.3e} (torch's) + "
        f"{absolute_tolerance(ours.dtype):.0e}"
    )


def pooled(draw: Callable[[int], Draw], but_for: Collection[str] = ()) -> Draw:
    """The results of draw(0), and of draw(1) and so on, flat and one after the other, until there
    are ENOUGH_NUMBERS of each that is not empty, `but_for` some.
    """
    draws = [draw(0)]
    sizes = [value.numel() for name, value in draws[0][2].items() if name not in but_for]
    smallest = min(filter(None, sizes), default=ENOUGH_NUMBERS)
    draws += [draw(seed) for seed in range(1, math.ceil(ENOUGH_NUMBERS / smallest))]
    if len(draws) == 1:
        return draws[0]
    for ours, in_torch, exact in draws:
        assert ours.keys() == in_torch.keys() == exact.keys()
        for name, value in exact.items():
            assert ours[name].shape == value.shape, (
                f"{name}: shape {ours[name].shape}, expected {value.shape}"
            )
    together = [
        {name: torch.cat([results[name].flatten() for results in by_seed]) for name in by_seed[0]}
        for by_seed in zip(*draws, strict=True)
    ]
    return together[0], together[1], together[2]
