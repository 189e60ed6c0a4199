"""Two processes compute what one computes, however they are started, and fail as one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import train_binary
from train_binary import SMALL_MODEL

# fp32 sums in another order; 24 steps of AdamW do not magnify it beyond this.
TOLERANCE = {"rel": 1e-5}


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    data = train_binary.make_data(tmp_path_factory.mktemp("data") / "words")
    # Micro batches of 2: four of them on one process, two on each of two.
    return (*SMALL_MODEL, data, "--config.data.batch_size=2")


@pytest.fixture(scope="module")
def one(flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    train_binary.train(*flags, "--workdir=run", cwd=folder)
    return folder / "run"


@pytest.fixture(scope="module")
def two(flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    summary = train_binary.train(*flags, "--config.trainer.devices=2", "--workdir=run", cwd=folder)
    assert summary["processes"] == 2
    return folder / "run"


def assert_same_curve(run: Path, other: Path) -> None:
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        assert train_binary.losses(run, name) == pytest.approx(
            train_binary.losses(other, name), **TOLERANCE
        )


def test_two_processes_have_the_curve_of_one(one: Path, two: Path) -> None:
    assert_same_curve(two, one)


def test_without_accumulation(flags: tuple[str, ...], one: Path, tmp_path: Path) -> None:
    """One micro batch a rank takes another path through DistributedDataParallel."""
    no_dropout = (*flags, "--config.model.resid_dropout=0", "--config.data.batch_size=4")
    for name, devices in (("one", 1), ("two", 2)):
        train_binary.train(
            *no_dropout, f"--config.trainer.devices={devices}", f"--workdir={name}", cwd=tmp_path
        )
    assert_same_curve(tmp_path / "two", tmp_path / "one")


def test_torchrun(flags: tuple[str, ...], two: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*torchrun, "--no_python", *train_binary.command(), *flags, "--workdir=run"],
        cwd=tmp_path,
        env=train_binary.environment(
            PYTHONPATH=os.pathsep.join(
                [*sys.path, train_binary.environment().get("PYTHONPATH", "")]
            )
        ),
        capture_output=True,
        text=True,
        timeout=train_binary.TIMEOUT_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert train_binary.losses(tmp_path / "run") == train_binary.losses(two)


def test_killed_and_continued(flags: tuple[str, ...], two: Path, tmp_path: Path) -> None:
    """The launcher alone is killed; its ranks must not live on, and the run goes on exactly."""
    arguments = (*flags, "--config.trainer.devices=2", "--workdir=run")
    process = train_binary.start(*arguments, cwd=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert train_binary.wait_until(
        lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 8, process
    )
    process.kill()
    process.wait()
    train_binary.train(*arguments, cwd=tmp_path)
    assert train_binary.losses(tmp_path / "run") == train_binary.losses(two)


def test_signal_to_the_launcher_saves(flags: tuple[str, ...], two: Path, tmp_path: Path) -> None:
    arguments = (*flags, "--config.trainer.devices=2", "--workdir=run")
    process = train_binary.start(*arguments, cwd=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert train_binary.wait_until(
        lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 8, process
    )
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    output = (tmp_path / "output.txt").read_text()
    assert output.count("stopped by a signal after step") == 1
    assert "Traceback" not in output
    assert train_binary.checkpoint_steps(tmp_path / "run")[-1] == max(
        train_binary.losses(tmp_path / "run")
    )
    train_binary.train(*arguments, cwd=tmp_path)
    assert train_binary.losses(tmp_path / "run") == train_binary.losses(two)


def test_user_error_is_one_line(flags: tuple[str, ...], tmp_path: Path) -> None:
    message = train_binary.error_line(
        *flags, "--config.trainer.devices=2", "--config.data.path=/nowhere", cwd=tmp_path
    )
    assert "/nowhere" in message


def test_death_of_a_rank_ends_the_run_with_one_error(
    flags: tuple[str, ...], tmp_path: Path
) -> None:
    endless = (*flags, "--config.trainer.max_steps=1000000", "--config.trainer.devices=2")
    process = train_binary.start(*endless, "--workdir=run", cwd=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert train_binary.wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, process)
    ranks = _children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    began = time.monotonic()
    assert process.wait(timeout=60) == 1
    assert time.monotonic() - began < 60
    output = (tmp_path / "output.txt").read_text()
    assert "error: rank 1 was killed by SIGKILL" in output
    assert "Traceback" not in output


def _children(pid: int) -> list[int]:
    """Processes that run the training program below `pid`, in the order they were started."""
    children = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        children += [int(child) for child in (task / "children").read_text().split()]
    trainers = []
    for child in sorted(children):
        if b"--workdir" in Path(f"/proc/{child}/cmdline").read_bytes():
            trainers += _children(child) or [child]
    return trainers
