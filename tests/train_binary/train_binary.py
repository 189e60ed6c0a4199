"""Runs the real training program in processes of its own, on a model and data made small.

Under Bazel the program is //experiments:train out of the runfiles; elsewhere experiments/train.py
with this Python.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flashtrain.data.token_files import write_token_files

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
    "--config.trainer.device=cpu",
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
        env["PYTHONPATH"] = f"{_repository() / 'python'}{os.pathsep}{_repository()}"
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


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """Starts the program; the caller ends it. Its output goes to `<cwd>/output.txt`."""
    with open(cwd / "output.txt", "a", encoding="utf-8") as output:
        return subprocess.Popen(
            [*command(), *arguments],
            cwd=cwd,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )


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


def make_data(folder: Path) -> str:
    """Writes a small prepared dataset; returns the flag that selects it."""
    words = [b"to be", b"or not", b"a king", b"a queen", b"the", b"rose", b"thou art"]
    order = np.random.default_rng(0).integers(0, len(words), 10_000)
    tokens = np.frombuffer(b" ".join(words[i] for i in order), np.uint8)
    write_token_files(
        folder,
        {"train": tokens[:40_000], "val": tokens[40_000:40_500]},
        tokenizer="bytes",
        vocab_size=256,
        source={"name": "words"},
    )
    return f"--config.data.path={folder}"


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and what it holds, but for the lock."""
    paths = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(paths)}


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> bool:
    """Polls every millisecond while the process runs; whether the condition came true."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(0.001)
    return False


def checkpoint_steps(workdir: Path) -> Sequence[int]:
    """Steps of the checkpoints in a run folder, in order."""
    return sorted(
        int(p.name.removeprefix("step_")) for p in (workdir / "checkpoints").glob("step_*")
    )


def _repository() -> Path:
    return Path(__file__).absolute().parents[2]
