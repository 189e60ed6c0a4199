"""Runs the programs of experiments/ as a shell would, hundreds a minute.

A program needs seconds to import torch. Here this process has imported it; each run is a fork that
takes the environment, folder, arguments and streams of its case, and calls the program's main.
"""

import dataclasses
import gc
import importlib
import io
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from flashtrain import environment
from flashtrain.train import launcher

PROGRAMS = ("train", "eval", "generate", "prepare_data", "inspect_data", "plot_loss")
TIMEOUT_SECONDS = 120


@dataclasses.dataclass(frozen=True)
class Result:
    """How a program ended, and what it said."""

    code: int  # negative: the signal that killed it
    stdout: str
    stderr: str
    timed_out: bool = False


def preload() -> None:
    """Imports all that the programs need, so that forks share it. Starts no thread."""
    for name in (
        *(f"experiments.{program}" for program in PROGRAMS),
        "flashtrain.train.loop",
        "flashtrain.train.load_model",
        "flashtrain.eval",
        "matplotlib.pyplot",
        "torch.utils.tensorboard",
    ):
        importlib.import_module(name)
    gc.freeze()  # forks shall not copy what collections would touch


def run(
    program: str,
    arguments: Sequence[str | bytes],
    *,
    cwd: Path,
    env: Mapping[str, str],
    setup: Callable[[], Any] = lambda: None,
    closed: Sequence[int] = (),
    encoding: str = "utf-8",
) -> Result:
    """Runs a program in a fork of this process.

    Args:
        arguments: of the command line; bytes that are no UTF-8 arrive as Python decodes them.
        env: the whole environment.
        setup: called in the fork just before the program, to take away what it relies on.
        closed: numbers of the standard streams that are closed.
        encoding: of the terminal.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            code = 99
            try:
                os.setsid()
                os.chdir(cwd)
                _redirect(out.fileno(), err.fileno())
                os.environ.clear()
                os.environ.update(env)
                sys.argv = [program, *map(os.fsdecode, arguments)]
                tempfile.tempdir = None
                setup()
                _open_streams(closed, encoding)
                environment.start()
                code = launcher.run_main(importlib.import_module(f"experiments.{program}").main)
            except BaseException:
                os.write(err.fileno(), traceback.format_exc().encode())
            finally:
                os._exit(code)
        code, timed_out = _wait(child)
        return Result(code, _text(out), _text(err), timed_out)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="backslashreplace")


def _redirect(out: int, err: int) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, file in enumerate((nothing, out, err)):
        os.dup2(file, number)
    os.close(nothing)


def _open_streams(closed: Sequence[int], encoding: str) -> None:
    """What Python does as it starts."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if number in closed:
            os.close(number)
            setattr(sys, name, None)
            continue
        errors = "backslashreplace" if name == "stderr" else "strict"
        raw: Any = open(number, f"{mode}b", closefd=False)  # noqa: SIM115
        stream = io.TextIOWrapper(raw, encoding=encoding, errors=errors)
        setattr(sys, name, stream)


def _wait(child: int) -> tuple[int, bool]:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), False
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGKILL, True
