"""Runs the real training program in processes of its own, on a model and data made small.

Under Bazel the program is //experiments:train out of the runfiles; elsewhere experiments/train.py
with this Python.
"""

import fcntl
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashtrain.data.token_files import write_token_files
from flashtrain.train import checkpoint

TIMEOUT_SECONDS = 240

# A run of a second or two on top of the quickstart, whatever that becomes; dropout is on so that
# random states matter.
SMALL_MODEL = (
    "--config.model.d_model=32",
    "--config.model.num_layers=2",
    "--config.model.num_heads=2",
    "--config.model.resid_dropout=0.1",
    "--config.model.max_seq_len=128",
    "--config.model.init_std=0.02",
    "--config.optim.lr=0.003",
    "--config.optim.warmup_steps=10",
    "--config.optim.schedule=cosine",
    "--config.optim.weight_decay=0.1",
    "--config.trainer.precision=fp32",
    "--config.data.seq_len=32",
    "--config.data.batch_size=8",
    "--config.trainer.global_batch_size=8",
    "--config.trainer.max_steps=24",
    "--config.trainer.log_every=1",
    "--config.trainer.eval_every=10",
    "--config.trainer.save_every=5",
    "--config.trainer.sample_tokens=8",
    f"--config.trainer.device={os.environ.get('FLASHTRAIN_TEST_DEVICE', 'cpu')}",
    "--config.trainer.deterministic=true",  # on a GPU; a CPU always is
)


def command() -> list[str]:
    """How the program is started; arguments go behind it."""
    if "TEST_SRCDIR" in os.environ:
        runfiles = Path(os.environ["TEST_SRCDIR"], os.environ["TEST_WORKSPACE"])
        return [str(runfiles / "experiments" / "train")]
    return [sys.executable, str(_repository() / "experiments" / "train.py")]


def environment(**changes: str) -> dict[str, str]:
    """The environment for `command`: this one, without what a launcher or Bazel might have left."""
    env = {k: v for k, v in os.environ.items() if k != "BUILD_WORKING_DIRECTORY"}
    env["OMP_NUM_THREADS"] = "1"  # quicker for small models, and the same on every machine
    if "TEST_SRCDIR" not in os.environ:
        paths = (str(_repository() / "python"), str(_repository()), env.get("PYTHONPATH", ""))
        env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return env | changes


def run(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs the program to its end."""
    return subprocess.run(
        [*command(), *arguments],
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )


class HeldRun:
    """The program in a process that goes on only while its output is read.

    So a test knows how far the run is, however busy the machine and quick the run: it writes stdout
    and stderr into a pipe that holds a single unread piece, and waits in the next. When a line has
    been read, the run is at most in the second one after it; what it does in the background goes
    on. Use as a context manager, which ends the process.
    """

    def __init__(self, *arguments: str, cwd: Path, **env: str):
        self._reader, writer = os.pipe2(os.O_DIRECT | os.O_CLOEXEC)  # every write is a piece
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1)  # the least, which is room for one
        self.process = subprocess.Popen(
            [*command(), *arguments],
            cwd=cwd,
            env=environment(**env),
            stdout=writer,
            stderr=writer,
        )
        os.close(writer)
        self.output = ""  # what has been read
        self._unfinished = b""  # a line of it

    def __enter__(self) -> "HeldRun":
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        self.close_output()

    def read_until(self, text: str) -> None:
        """Reads up to the line that holds `text`."""
        while (line := self._read_line(TIMEOUT_SECONDS)) is not None:
            if text in line:
                return
        raise AssertionError(f"ended before {text!r}:\n{self.output}")

    def read_for(self, seconds: float, lines: int) -> None:
        """Reads what comes in that time, but no more lines than that."""
        deadline = time.monotonic() + seconds
        for _ in range(lines):
            try:
                line = self._read_line(deadline - time.monotonic())
            except TimeoutError:
                return
            assert line is not None, self.output

    def read_to_end(self) -> int:
        """Reads until the process and all that it has started have ended; its exit code."""
        while self._read_line(TIMEOUT_SECONDS) is not None:
            pass
        return self.process.wait(TIMEOUT_SECONDS)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Polls, reading nothing, until what the run does in the background makes it true."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.001)

    def close_output(self) -> None:
        """Nobody will read any more."""
        if self._reader >= 0:
            os.close(self._reader)
            self._reader = -1

    def _read_line(self, seconds: float) -> str | None:
        """The next line, None at the end; TimeoutError if none comes in that time."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._unfinished:
            if not select.select([self._reader], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"nothing for {seconds:.3f} seconds after:\n{self.output}")
            piece = os.read(self._reader, select.PIPE_BUF)
            if not piece:
                return None
            self._unfinished += piece
        line, _, self._unfinished = self._unfinished.partition(b"\n")
        self.output += line.decode(errors="replace") + "\n"
        return line.decode(errors="replace")


def train(*arguments: str, cwd: Path, **env: str) -> dict[str, Any]:
    """Runs the program to a good end; returns its summary, the last line of stdout."""
    result = run(*arguments, cwd=cwd, **env)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def error_line(*arguments: str, cwd: Path, **env: str) -> str:
    """Runs the program, asserts that it ends as a user error does, and returns its one line."""
    result = run(*arguments, cwd=cwd, **env)
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: "), result.stderr
    return lines[0].removeprefix("error: ")


def losses(workdir: Path, name: str = "train/loss") -> dict[int, float]:
    """The logged loss by step, exact to the bit."""
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    found = [(e["step"], e[name]) for e in entries if name in e]
    by_step = dict(found)
    assert len(by_step) == len(found), "a step was logged twice"
    return by_step


def tensors(workdir: Path, step: int) -> dict[str, torch.Tensor]:
    """What a checkpoint of a run holds, whole tensors by name."""
    reader = checkpoint.Reader(checkpoint.read(checkpoint.path_of(workdir / "checkpoints", step)))
    return {name: reader.read(name) for name in reader.names("")}


def assert_same_run(run: Path, other: Path) -> None:
    """Both have ended at the same step, bit for bit the same."""
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        assert losses(run, name) == losses(other, name), name
    summary, expected = (json.loads((r / "summary.json").read_text()) for r in (run, other))
    for key in ("step", "tokens", "train/loss", "val/loss", "skipped_steps"):
        assert summary[key] == expected[key], key
    saved, expected_tensors = (tensors(r, expected["step"]) for r in (run, other))
    assert saved.keys() == expected_tensors.keys()
    for name, tensor in expected_tensors.items():
        assert torch.equal(saved[name], tensor), name


def make_data(folder: Path, *, train: int = 40_000) -> str:
    """Writes a small prepared dataset; returns the flag that selects it.

    Args:
        train: tokens to train on.
    """
    words = [b"to be", b"or not", b"a king", b"a queen", b"the", b"rose", b"thou art"]
    order = np.random.default_rng(0).integers(0, len(words), 10_000)
    tokens = np.frombuffer(b" ".join(words[i] for i in order), np.uint8)
    write_token_files(
        folder,
        {"train": tokens[:train], "val": tokens[40_000:40_500]},
        tokenizer="bytes",
        vocab_size=256,
        source={"name": "words"},
    )
    return f"--config.data.path={folder}"


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and what it holds, but for the lock."""
    paths = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(paths)}


def checkpoint_steps(workdir: Path) -> Sequence[int]:
    """Steps of the checkpoints in a run folder, in order."""
    found = checkpoint.paths(workdir / "checkpoints")
    return sorted(int(path.name.removeprefix("step_")) for path in found)


def _repository() -> Path:
    return Path(__file__).absolute().parents[2]
