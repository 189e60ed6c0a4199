"""Several processes compute what one computes, however they share it, and fail as one."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import train_binary
from train_binary import SMALL_MODEL

STRATEGIES = ("ddp", "zero1", "fsdp2")

ON_GPU = os.environ.get("FLASHTRAIN_TEST_DEVICE") == "cuda"
MOST_RANKS = min(4, torch.cuda.device_count()) if ON_GPU else 4
four_ranks = pytest.param(4, marks=pytest.mark.skipif(MOST_RANKS < 4, reason="too few GPUs"))

# fp32 sums in another order; 24 steps of AdamW do not magnify it beyond this.
ROUNDING = 1e-5

INTERRUPTED = 75


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    data = train_binary.make_data(tmp_path_factory.mktemp("data") / "words")
    # Micro batches of 2: four of them on one process, two on each of two.
    return (*SMALL_MODEL, data, "--config.data.batch_size=2")


class Runs:
    """Undisturbed runs, each made when it is first asked for."""

    def __init__(self, flags: tuple[str, ...], folder: Path):
        self._flags = flags
        self._folder = folder

    def __call__(self, strategy: str, ranks: int, *changes: str) -> Path:
        run = self._folder / "-".join((strategy, str(ranks), *changes)).replace("/", "")
        if not run.exists():
            shared = sharing(strategy, ranks)
            summary = train_binary.train(
                *self._flags, *shared, *changes, f"--workdir={run}", cwd=self._folder
            )
            assert summary["processes"] == ranks
        return run


def sharing(strategy: str, ranks: int) -> tuple[str, str]:
    return f"--config.trainer.strategy={strategy}", f"--config.trainer.devices={ranks}"


@pytest.fixture(scope="module")
def runs(flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(flags, tmp_path_factory.mktemp("runs"))


def assert_same_curve(run: Path, other: Path, rel: float = ROUNDING) -> None:
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        assert train_binary.losses(run, name) == pytest.approx(
            train_binary.losses(other, name), rel=rel
        )


@pytest.mark.parametrize("ranks", [2, four_ranks])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_has_the_curve_of_one_process(strategy: str, ranks: int, runs: Runs) -> None:
    run = runs(strategy, ranks)
    assert_same_curve(run, runs("ddp", 1))
    # On a GPU a step may be logged before it is timed.
    assert sum(train_binary.losses(run, "time/communication").values()) > 0
    saved, expected = (train_binary.tensors(r, 24) for r in (run, runs("ddp", 1)))
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_without_accumulation(runs: Runs) -> None:
    """One micro batch a rank takes another path through DistributedDataParallel."""
    alone = ("--config.model.resid_dropout=0", "--config.data.batch_size=4")
    assert_same_curve(runs("ddp", 2, *alone), runs("ddp", 1, *alone))


@pytest.mark.parametrize(
    ("strategy", "precision", "option"),
    [("fsdp2", "bf16", "ema_decay=0.8"), ("zero1", "fp16", "low_precision_weights=true")],
)
def test_low_precision(strategy: str, precision: str, option: str, runs: Runs) -> None:
    """Sums in bf16, a loss scale and a guard that all ranks share."""
    changes = (
        f"--config.trainer.precision={precision}",
        "--config.trainer.reduce_dtype=bf16",
        "--config.trainer.spike_zscore=20",
        f"--config.trainer.{option}",
    )
    assert_same_curve(runs(strategy, 2, *changes), runs("ddp", 1, *changes), rel=0.01)


def kill_after(step: int, arguments: Sequence[str], cwd: Path) -> str:
    """Kills a run's launcher alone, between a save and the next, and waits for the ranks' death.

    Gives what the run has said.
    """
    with train_binary.HeldRun(*arguments, cwd=cwd) as held:
        held.read_until(f"step {step}/24")
        held.wait_until(lambda: step // 5 * 5 in train_binary.checkpoint_steps(cwd / "run"))
        held.process.kill()
        assert held.read_to_end() == -signal.SIGKILL
    return held.output


def test_goes_on_with_other_ranks_and_strategies(
    flags: tuple[str, ...], runs: Runs, tmp_path: Path
) -> None:
    lives = [("ddp", 1, 6), ("fsdp2", MOST_RANKS, 11), ("zero1", 2, 16), ("fsdp2", 2, 21)]
    for number, (strategy, ranks, step) in enumerate(lives):
        said = kill_after(step, (*flags, *sharing(strategy, ranks), "--workdir=run"), tmp_path)
        assert number == 0 or f"continuing from step {5 * number}" in said
    last = train_binary.run(*flags, *sharing("zero1", MOST_RANKS), "--workdir=run", cwd=tmp_path)
    assert last.returncode == 0, last.stderr
    assert "continuing from step 20" in last.stderr
    assert_same_curve(tmp_path / "run", runs("ddp", 1))


def test_torchrun(flags: tuple[str, ...], runs: Runs, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    torchrun += ["--local_addr=127.0.0.1"]  # whatever the host's name resolves to, if to anything
    result = subprocess.run(
        [*torchrun, "--no_python", *train_binary.command(), *flags, "--workdir=run"],
        cwd=tmp_path,
        env=train_binary.environment(
            PYTHONPATH=os.pathsep.join(
                [*sys.path, train_binary.environment().get("PYTHONPATH", "")]
            ),
            GLOO_SOCKET_IFNAME="lo",
        ),
        capture_output=True,
        text=True,
        timeout=train_binary.TIMEOUT_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert train_binary.losses(tmp_path / "run") == train_binary.losses(runs("ddp", 2))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_killed_and_continued(
    strategy: str, flags: tuple[str, ...], runs: Runs, tmp_path: Path
) -> None:
    """On as many ranks as before the run ends bit for bit the same."""
    arguments = (*flags, *sharing(strategy, 2), "--workdir=run")
    kill_after(7, arguments, tmp_path)
    train_binary.train(*arguments, cwd=tmp_path)
    train_binary.assert_same_run(tmp_path / "run", runs(strategy, 2))


def test_signals_to_the_launcher_save(flags: tuple[str, ...], runs: Runs, tmp_path: Path) -> None:
    run, arguments = tmp_path / "run", (*flags, *sharing("fsdp2", 2), "--workdir=run")
    with train_binary.HeldRun(*arguments, cwd=tmp_path) as held:
        held.read_until("step 7/24")
        held.process.send_signal(signal.SIGTERM)
        held.read_until("step 8/24")
        held.process.send_signal(signal.SIGINT)  # another one changes nothing
        assert held.read_to_end() == INTERRUPTED
    assert held.output.count("stopped by a signal after step") == 1
    assert "Traceback" not in held.output
    assert train_binary.checkpoint_steps(run)[-1] == max(train_binary.losses(run)) <= 12
    train_binary.train(*arguments, cwd=tmp_path)
    train_binary.assert_same_run(run, runs("fsdp2", 2))


@pytest.mark.parametrize("ranks", [0, 1, 2])
def test_signal_before_training_is_one_line(
    ranks: int, flags: tuple[str, ...], tmp_path: Path
) -> None:
    """When so many of two ranks are there."""
    arguments = (*flags, *sharing("ddp", 2), "--workdir=run")
    with train_binary.HeldRun(*arguments, cwd=tmp_path) as held:
        pid = held.process.pid
        held.wait_until(lambda: _hands_on(pid) and len(_ranks(pid)) >= ranks)
        held.process.send_signal(signal.SIGTERM)
        assert held.read_to_end() == 128 + signal.SIGTERM
    assert held.output == "interrupted before training began\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_that_have_just_started_end_with_the_launcher(
    ranks: int, flags: tuple[str, ...], tmp_path: Path
) -> None:
    arguments = (*flags, *sharing("ddp", 2), "--workdir=run")
    with train_binary.HeldRun(*arguments, cwd=tmp_path) as held:
        held.wait_until(lambda: len(_ranks(held.process.pid)) >= ranks)
        held.process.kill()
        assert held.read_to_end() == -signal.SIGKILL
    assert held.output == ""
    assert list(tmp_path.iterdir()) == []


def _hands_on(pid: int) -> bool:
    """Whether a launcher has come to handling SIGTERM."""
    caught = re.search(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def test_user_error_is_one_line(flags: tuple[str, ...], tmp_path: Path) -> None:
    message = train_binary.error_line(
        *flags, "--config.trainer.devices=2", "--config.data.path=/nowhere", cwd=tmp_path
    )
    assert "/nowhere" in message


@pytest.mark.parametrize(("strategy", "victim"), [("ddp", 1), ("fsdp2", 0)])
def test_death_of_a_rank_ends_the_run_with_one_error(
    strategy: str, victim: int, flags: tuple[str, ...], tmp_path: Path
) -> None:
    arguments = (*flags, *sharing(strategy, 2), "--workdir=run")
    with train_binary.HeldRun(*arguments, cwd=tmp_path) as held:
        held.read_until("step 1/24")
        ranks = _ranks(held.process.pid)
        assert sorted(ranks) == [0, 1]
        os.kill(ranks[victim], signal.SIGKILL)
        began = time.monotonic()
        assert held.read_to_end() == 1
        assert time.monotonic() - began < 60
    assert f"error: rank {victim} was killed by SIGKILL" in held.output
    assert "Traceback" not in held.output


def _ranks(pid: int) -> dict[int, int]:
    """Rank to process id of the training programs that a launcher has started.

    The rank is read from the process: the order of process ids is not that of their starts.
    """
    ranks: dict[int, int] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it ended meanwhile
            process = Path("/proc", name)
            parent = int((process / "stat").read_bytes().rpartition(b")")[2].split()[1])
            rank = re.search(rb"\0RANK=(\d+)\0", (process / "environ").read_bytes())
            if parent == pid and rank:
                ranks[int(rank[1])] = int(name)
    return ranks
