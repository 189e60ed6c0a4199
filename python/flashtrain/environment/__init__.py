"""What shells, clusters and launchers leave to a program, settled before anything depends on it.

A program calls `start` before its other imports: those take seconds, and a signal may come at any
time. So this module imports little.
"""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

from flashtrain.errors import UserError

# Those that ask a program to stop. A closed terminal sends SIGHUP.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
INTERRUPTED = "interrupted before training began"

# torchrun sets all of them, and our launcher does so through it.
_SET_BY_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
_SLURM_TASKS = "SLURM_STEP_NUM_TASKS"  # of the srun that has started this process
_THREADS = "OMP_NUM_THREADS"
_MOST_THREADS = 4096
_USER_FOLDER = "BUILD_WORKING_DIRECTORY"  # set by `bazel run`


class Interrupted(KeyboardInterrupt):
    """A signal that asks to stop, in work that puts things in order before it leaves."""

    def __init__(self, number: int, text: str):
        super().__init__(number)
        self.number = number
        self.text = text  # for the user


class Ranks(NamedTuple):
    """This process among those of a run, as a launcher has numbered them."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def start(interrupted: str = INTERRUPTED) -> None:
    """Opens what is closed of stdin, stdout and stderr; from now on signals have an answer.

    The first of `STOP_SIGNALS` ends the program with one line and exit code 128 + its number.

    Args:
        interrupted: that line.
    """
    _open_standard_streams()

    def leave(number: int, frame: FrameType | None) -> None:
        # No exception: libraries catch those that come while they are imported.
        on_stop_signals(signal.SIG_IGN)
        try:
            os.write(2, f"{interrupted}\n".encode())
        finally:
            os._exit(128 + number)

    if is_worker():
        # Its launcher speaks to the user, and ends it with SIGTERM.
        on_stop_signals(signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    else:
        on_stop_signals(leave)


def on_stop_signals(handler: Callable[[int, FrameType | None], Any] | signal.Handlers) -> None:
    """Handles `STOP_SIGNALS`; but nohup's wish that SIGHUP be ignored is respected."""
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def enter_user_folder() -> None:
    """Relative paths mean the user's folder, also where `bazel run` has started us elsewhere.

    Raises:
        UserError: it is not there.
    """
    folder = os.environ.get(_USER_FOLDER)
    try:
        if folder:
            os.chdir(folder)
        os.getcwd()
    except OSError as error:
        name = f"{_USER_FOLDER}={folder}" if folder else "the current folder"
        raise UserError(
            f"{name} cannot be entered: {error.strerror}; start from a folder that exists"
        ) from None


def check_threads() -> None:
    """Raises UserError where OMP_NUM_THREADS is wrong; an empty one is as none. Before torch."""
    value = os.environ.get(_THREADS)
    if value is None:
        return
    if not value.strip():
        del os.environ[_THREADS]
        return
    # OpenMP takes a list, a number for each level of nesting.
    if not all(n.strip().isdecimal() and 1 <= int(n) <= _MOST_THREADS for n in value.split(",")):
        raise UserError(
            f"{_THREADS}={value!r:.80} must be a number of threads from 1 to {_MOST_THREADS}; "
            "correct it, or unset it"
        )


def is_worker() -> bool:
    """Whether a launcher has started this process; where the variables contradict, not."""
    try:
        return ranks() is not None
    except UserError:
        return False


def ranks() -> Ranks | None:
    """Who this process is among those that a launcher (ours, torchrun, another) has started.

    None: no launcher has. Clusters set some of the variables for a pod, and shells keep them, so
    only all of them together count.

    Raises:
        UserError: they promise other processes, but not how to find them; or they contradict.
    """
    found = {name: v for name in _SET_BY_LAUNCHERS if (v := os.environ.get(name, "").strip())}
    missing = [name for name in _SET_BY_LAUNCHERS if name not in found]
    if not missing:
        return _numbers(found)
    if any(found.get(name, alone) != alone for name, alone in _ALONE.items()):
        raise UserError(
            f"{_shown(found)} set, but {', '.join(missing)} not: no launcher has started this "
            f"process; unset {', '.join(found)}, or start with torchrun, which sets all of them"
        )
    if (tasks := os.environ.get(_SLURM_TASKS, "")).isdecimal() and int(tasks) > 1:
        raise UserError(
            f"{_SLURM_TASKS}={tasks}: srun has started this program {tasks} times, but no launcher "
            f"joins them; start one torchrun a node (docs/training.md), or unset {_SLURM_TASKS} if "
            "each shall work alone"
        )
    return None


def _numbers(found: dict[str, str]) -> Ranks:
    found = found | {"LOCAL_WORLD_SIZE": os.environ.get("LOCAL_WORLD_SIZE") or found["WORLD_SIZE"]}
    del found["MASTER_ADDR"]
    try:
        numbers = {name: int(value) for name, value in found.items()}
    except ValueError:
        numbers = dict.fromkeys(found, -1)
    rank, size = numbers["RANK"], numbers["WORLD_SIZE"]
    local_rank, local_size = numbers["LOCAL_RANK"], numbers["LOCAL_WORLD_SIZE"]
    if not (
        0 <= local_rank <= rank < size
        and local_rank < local_size <= size
        and 0 < numbers["MASTER_PORT"] < 2**16
    ):
        raise UserError(
            f"{_shown(found)} set, which contradict: ranks count from 0, to less than their size, "
            "and a port is below 65536; unset them, or start with torchrun, which sets them"
        )
    return Ranks(rank, size, local_rank, local_size)


def _shown(found: dict[str, str]) -> str:
    pairs = [f"{name}={value:.40}" for name, value in found.items()]
    return f"{', '.join(pairs)} {'are' if len(pairs) > 1 else 'is'}"


def _open_standard_streams() -> None:
    """A file that is opened later must not become number 2, which libraries write warnings to."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            os.set_inheritable(opened, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
