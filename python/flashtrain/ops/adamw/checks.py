"""Checks of what FusedAdamW and global_grad_norm are given."""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from flashtrain.ops._arguments import FLOAT_DTYPE_NAMES, FLOAT_DTYPES, check_written

_FLOAT32_MAX = torch.finfo(torch.float32).max


def check_tensor(name: str, tensor: Any) -> None:
    """A dense tensor of floats with memory that kernels can read."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}; supported: a tensor")
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name}: got dtype {tensor.dtype}; supported: {FLOAT_DTYPE_NAMES}")
    fake = isinstance(tensor, FakeTensor)
    if fake or not (tensor.is_cuda or tensor.is_cpu) or tensor.layout is not torch.strided:
        raise ValueError(
            f"{name}: got a {'fake' if fake else tensor.layout} tensor on {tensor.device}; "
            "supported: dense, on cpu or cuda"
        )


def check_parameter(name: str, tensor: Any) -> None:
    """A tensor that a step can write to."""
    check_tensor(name, tensor)
    for wrong, what in (
        (tensor.is_neg(), "a view with a negative bit"),
        (tensor.is_inference(), "a tensor made under torch.inference_mode"),
    ):
        if wrong:
            raise ValueError(f"{name}: got {what}; supported: a copy")
    check_written(name, tensor)


def check_element(name: str, value: Tensor) -> None:
    """One real number in memory."""
    dense = value.layout is torch.strided and not value.is_meta
    if value.numel() != 1 or not dense or value.is_complex() or isinstance(value, FakeTensor):
        kind = "fake" if isinstance(value, FakeTensor) else value.layout
        raise ValueError(
            f"{name}: got shape {list(value.shape)} on {value.device}, {value.dtype}, "
            f"{kind}; supported: one real number, dense, on cpu or cuda"
        )


def _values(group: dict[str, Any]) -> Iterator[tuple[str, Any, float]]:
    betas, lr = group["betas"], group["lr"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas: got {betas!r:.80}; supported: two numbers")
    if isinstance(lr, Tensor):
        check_element("lr", lr)
        # What a GPU holds is not waited for.
        lr = lr.item() if lr.is_cpu else 0.0
    yield "lr", lr, _FLOAT32_MAX
    yield "betas[0]", betas[0], 1.0
    yield "betas[1]", betas[1], 1.0
    yield "eps", group["eps"], _FLOAT32_MAX
    yield "weight_decay", group["weight_decay"], _FLOAT32_MAX


def check_values(group: dict[str, Any]) -> None:
    """Hyperparameters of a group, which users change between steps: finite, and in range."""
    for name, value, end in _values(group):
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise TypeError(f"{name}: got {type(value).__name__}; supported: a number")
        if not 0.0 <= value < end:  # type: ignore[operator]  # float() of 10**400 overflows
            raise ValueError(f"{name}: got {value}; supported: at least 0 and less than {end:g}")


def check_scale(value: Any) -> None:
    if not 0.0 < abs(value) <= _FLOAT32_MAX:
        raise ValueError(f"grad_scale: got {value}; supported: finite numbers but 0")
