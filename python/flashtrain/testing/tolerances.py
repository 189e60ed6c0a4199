"""The two-sided error rule by which kernels are judged.

    max|ours - exact| <= k * max|torch - exact| + a

`exact` is computed in float64 from the same inputs, `torch` by the plain torch expression in the
dtypes of ours. So a kernel may be as wrong as torch is, times k, and no more: the bound follows the
data and the dtype, and is not a constant somebody tuned. (The rule is that of flash-attention's
tests.)
"""

from __future__ import annotations

import torch
from torch import Tensor

K_OUTPUT = 2.0  # outputs and gradients of activations
K_DROPOUT = 4.0  # the same where dropout is on
K_WEIGHT_GRAD = 3.0


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
