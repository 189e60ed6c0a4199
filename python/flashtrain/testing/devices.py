"""The device under test, and memory that shows what a kernel left unwritten."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch


def device_under_test() -> torch.device:
    """cpu, or the one that FLASHTRAIN_TEST_DEVICE names; the gpu targets set it to cuda.

    Raises RuntimeError where that is a CUDA device and there is none: a GPU test never passes on
    another device.
    """
    device = torch.device(os.environ.get("FLASHTRAIN_TEST_DEVICE", "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"FLASHTRAIN_TEST_DEVICE={device}, but torch finds no CUDA device")
    return device


DEVICE = device_under_test()

cuda_only = pytest.mark.skipif(DEVICE.type != "cuda", reason="the device under test is not CUDA")
two_gpus_only = pytest.mark.skipif(
    DEVICE.type != "cuda" or torch.cuda.device_count() < 2, reason="needs two CUDA devices"
)


def needs_gpu_memory(gibibytes: float) -> pytest.MarkDecorator:
    """Skips on CPU and on a GPU with less memory than that."""
    total = torch.cuda.get_device_properties(DEVICE).total_memory if DEVICE.type == "cuda" else 0
    return pytest.mark.skipif(
        total < gibibytes * 2**30, reason=f"needs a GPU with {gibibytes} GiB of memory"
    )


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its kin return NaN (integers: the largest value) rather than leftovers."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    # warn_only: the reference expressions may use what has no deterministic form on CUDA.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill
