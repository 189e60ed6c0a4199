"""Thousands of random calls of each op: an error that names an argument, or the right answer."""

import pytest

from flashtrain.testing import fuzz
from flashtrain.testing.devices import DEVICE

MODULES = {
    "adamw": "adamw_fuzz",
    "attention": "attention.fuzz",
    "cross_entropy": "cross_entropy_fuzz",
    "fused_dense": "fused_dense.fuzz",
    "layer_norm": "layer_norm_fuzz",
    "linear_cross_entropy": "linear_cross_entropy_fuzz",
    "rotary": "rotary.fuzz",
}
CALLS = 10_000
SEED = 20261124


@pytest.mark.parametrize("op", MODULES)
def test_random_calls(op: str) -> None:
    # On CUDA most calls of attention compile Triton kernels of their own.
    calls = 500 if op == "attention" and DEVICE.type == "cuda" else CALLS
    # A minute alone on a machine; ten for a crowded one.
    print(fuzz.run_in_process(f"flashtrain.ops.{MODULES[op]}", SEED, calls, timeout=600))
