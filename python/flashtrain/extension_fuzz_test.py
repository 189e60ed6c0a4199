"""Thousands of random calls of the extension: an error that names an argument, or what is right."""

from flashtrain.testing import fuzz

CALLS = 6000
SEED = 20261129


def test_random_calls() -> None:
    print(fuzz.run_in_process("flashtrain.extension_fuzz", SEED, CALLS, timeout=600))
