"""Ranges of a config's numbers, and what to say of a value that is of another type or out of range.

NaN and infinities are in no range, so no key needs to be checked for them.
"""

import numbers
from typing import Any, NamedTuple

_MOST_FLOAT = 3e38  # of what fp32 holds, in which devices compute
_TYPES: dict[type, type] = {int: numbers.Integral, float: numbers.Real, bool: bool, str: str}


class Range(NamedTuple):
    """From `least` to `most`, of which the latter may be left out."""

    least: float
    most: float
    half_open: bool = False

    def problem(self, value: float) -> str | None:
        """What a value that is not in the range must do, to be put behind "must"."""
        if self.least <= value and (
            value < self.most or (value == self.most and not self.half_open)
        ):
            return None
        if self.half_open:
            return f"lie in [{self.least}, {self.most})"
        return f"be at most {self.most}" if value > self.most else f"be at least {self.least}"


PROBABILITY = Range(0, 1, half_open=True)
POSITIVE = Range(1e-30, _MOST_FLOAT)
COUNT = Range(1, 2**31 - 1)
SEED = Range(0, 2**64 - 1)
_BY_TYPE = {int: Range(0, 2**63 - 1), float: Range(0, _MOST_FLOAT)}


def problem(value: Any, kind: type, allowed: Range | None = None) -> str | None:
    """What a value must be or do, to be put behind "must"; None: it is right.

    Args:
        kind: int, float, bool or str.
        allowed: the range of a number; None: from 0 to what its type holds.
    """
    if not isinstance(value, _TYPES[kind]) or (kind is not bool and isinstance(value, bool)):
        return f"be {kind.__name__}"
    number: Any = value  # mypy: of text it is not asked
    return (allowed or _BY_TYPE[kind]).problem(number) if kind in _BY_TYPE else None


def shown(value: Any) -> str:
    """A value in a message, of bearable length."""
    try:
        text = repr(value)
    except Exception as error:  # of an object of the user's; Python's integers may be too long
        text = f"<{type(value).__name__}: {error}>"
    return text if len(text) <= 80 else f"{text[:77]}..."
