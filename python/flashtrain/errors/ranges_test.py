"""Every number of a config is finite and of a size that its use allows."""

import math

import pytest

from flashtrain.errors.ranges import COUNT, PROBABILITY, SEED, problem, shown


@pytest.mark.parametrize(
    ("value", "kind", "allowed", "expected"),
    [
        (3, int, COUNT, None),
        (0, int, COUNT, "be at least 1"),
        (2**31, int, COUNT, "be at most 2147483647"),
        (2**64, int, SEED, "be at most 18446744073709551615"),
        (2**63, int, None, "be at most 9223372036854775807"),
        (-1, int, None, "be at least 0"),
        (True, int, COUNT, "be int"),
        (1.0, int, COUNT, "be int"),
        ("1", int, COUNT, "be int"),
        (1, float, None, None),
        (10**400, float, None, "be at most 3e+38"),
        (math.inf, float, None, "be at most 3e+38"),
        (-math.inf, float, None, "be at least 0"),
        (math.nan, float, None, "be at least 0"),
        (math.nan, float, PROBABILITY, "lie in [0, 1)"),
        (1.0, float, PROBABILITY, "lie in [0, 1)"),
        (1, bool, None, "be bool"),
        (None, str, None, "be str"),
    ],
)
def test_problem(value, kind, allowed, expected) -> None:
    assert problem(value, kind, allowed) == expected


def test_shown_is_short() -> None:
    assert shown("a") == "'a'"
    assert len(shown("a" * 1000)) == 80
    assert "int" in shown(10**5000)  # which Python refuses to print
