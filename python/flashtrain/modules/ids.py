"""Ids of tokens, positions and classes that are outside their range."""

from torch import Tensor


def outside(name: str, ids: Tensor, end: int, ignored: int | None = None) -> ValueError | None:
    """The error that names an id outside 0..end-1, None where there is no such id.

    Args:
        name: what the ids are of.
        ignored: an id that is allowed, too.
    """
    wrong = (ids < 0) | (ids >= end)
    if ignored is not None:
        wrong &= ids != ignored
    if not wrong.any():
        return None
    also = "" if ignored is None else f" and {ignored}"
    return ValueError(f"{name} {ids[wrong][0].item()} came; supported: 0..{end - 1}{also}")
