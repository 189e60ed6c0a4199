"""Thousands of random calls of the norms: an error that names an argument, or the right answer."""

from flashtrain.testing import fuzz

CALLS = 5_000
SEED = 20261124


def test_random_calls() -> None:
    module = "flashtrain.compat.flash_attn.norm_fuzz"
    print(fuzz.run_in_process(module, SEED, CALLS, timeout=600))
