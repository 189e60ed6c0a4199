"""What only a process of its own shows: signals while it starts, and how Python itself starts."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import train_binary

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def command(program: str, *arguments: str) -> list[str]:
    """How it is started: as train_binary starts the training program, in Python's -c."""
    text = (
        "import runpy, sys, importlib.util\n"
        f"path = importlib.util.find_spec('experiments.{program}').origin\n"
        "sys.argv[0] = path\n"
        "runpy.run_path(path, run_name='__main__')"
    )
    return [sys.executable, "-c", text, *arguments]


def environment(**changes: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, sys.path))
    return train_binary.environment(PYTHONPATH=path, **changes)


@pytest.mark.parametrize(
    ("program", "number"),
    [*(("train", n) for n in SIGNALS), *((p, signal.SIGINT) for p in forked.PROGRAMS[1:])],
)
def test_a_signal_at_the_start_is_one_line(
    program: str, number: signal.Signals, tmp_path: Path
) -> None:
    """Sent as soon as the program has an answer, while it imports what it needs."""
    process = subprocess.Popen(
        command(program),
        cwd=tmp_path,
        env=environment(DATA_DIR=str(tmp_path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + train_binary.TIMEOUT_SECONDS
    while not _catches_hangups(process.pid):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(number)
    out, err = process.communicate(timeout=train_binary.TIMEOUT_SECONDS)
    assert (process.returncode, out) == (128 + number, "")
    assert err in ("interrupted\n", "interrupted before training began\n")
    assert list(tmp_path.iterdir()) == []


def _catches_hangups(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = re.search(r"^SigCgt:\s*(\w+)$", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGHUP - 1) & 1)


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("train", ["--config.trainer.devices=2"]),
        ("prepare_data", ["--dataset=text:*.txt", "--out=out", "--workers=2"]),
        ("plot_loss", ["--runs=run", "--out=loss.svg"]),
    ],
)
def test_all_at_once(program: str, arguments: list[str], tmp_path: Path) -> None:
    """No docstrings, no home, no user, no locale, no streams, a deep temporary folder."""
    data = train_binary.make_data(tmp_path / "words", train=4_000)
    deep = tmp_path.joinpath(*["deep" * 10] * 4)
    deep.mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("To be or not to be.\n" * 99)
    if program == "train":
        small = (*train_binary.SMALL_MODEL, data, "--config.trainer.max_steps=2")
        arguments = [*small, "--config.trainer.sample_tokens=0", "--workdir=out", *arguments]
    env = environment(
        PYTHONOPTIMIZE="2",
        LC_ALL="C",
        PYTHONUTF8="0",
        PYTHONCOERCECLOCALE="0",
        TMPDIR=str(deep),
        OMP_NUM_THREADS="",
        WORLD_SIZE="1",
        RANK="",
    )
    for name in ("HOME", "USER", "LOGNAME", "MPLCONFIGDIR", "HF_HOME"):
        env.pop(name, None)
    result = subprocess.run(
        ["bash", "-c", '"$@" <&- >&-', "bash", *command(program, *arguments)],
        cwd=tmp_path,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        timeout=train_binary.TIMEOUT_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    made = {"train": "out/summary.json", "prepare_data": "out/manifest.json"}
    assert (tmp_path / made.get(program, "loss.svg")).is_file()
    assert not list(deep.glob("flashtrain-launch-*"))
