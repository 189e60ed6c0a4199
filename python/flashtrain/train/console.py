"""A program's lines to its user, who may be gone.

A closed terminal, or the end of a pipe's reader (tee ends at the Ctrl-C that asks a run to save),
is no reason to fail. A redirection to a file that cannot be written still is one.
"""

import contextlib
import errno
import os
import select
import sys
from collections.abc import Iterator
from typing import IO

_NOBODY_THERE = (errno.EPIPE, errno.EIO)


def say(text: str) -> None:
    """Prints lines to stderr in one piece, which lines of other processes do not interrupt."""
    with heard_or_not(sys.stderr):
        print(f"{text}\n", end="", file=sys.stderr, flush=True)


def answer(text: str) -> None:
    """Prints lines to stdout, likewise."""
    with heard_or_not(sys.stdout):
        print(f"{text}\n", end="", flush=True)


@contextlib.contextmanager
def heard_or_not(stream: IO[str]) -> Iterator[None]:
    """Around code that writes to `stream` and flushes it; drops errors of a gone reader."""
    try:
        yield
    except OSError as error:
        # The stream keeps what it could not write, and would fail again when Python ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        if error.errno not in _NOBODY_THERE:
            raise OSError(error.errno, error.strerror, stream.name) from None


def reader_has_left() -> bool:
    """Whether stdout is a pipe that nobody will read."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def drop_unwritten() -> None:
    """Call it before the end, where Python would fail once more for the unwritten output."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError), heard_or_not(stream):
            stream.flush()
