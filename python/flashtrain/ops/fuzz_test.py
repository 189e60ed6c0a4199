"""Thousands of random calls of each op: an error that names an argument, or the right answer."""

import pytest

from flashtrain.testing import fuzz
from flashtrain.testing.devices import DEVICE

OPS = (
    "adamw",
    "attention",
    "cross_entropy",
    "fused_dense",
    "layer_norm",
    "linear_cross_entropy",
    "rotary",
)
CALLS = 10_000
SEED = 20261124


@pytest.mark.parametrize("op", OPS)
def test_random_calls(op: str) -> None:
    # On CUDA most calls of attention compile Triton kernels of their own.
    calls = 500 if op == "attention" and DEVICE.type == "cuda" else CALLS
    # A minute alone on a machine; ten for a crowded one.
    print(fuzz.run_in_process(f"flashtrain.ops.{op}.fuzz", SEED, calls, timeout=600))
