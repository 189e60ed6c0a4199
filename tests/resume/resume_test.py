"""A run that was killed and started again ends bit for bit like one that was not."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
import train_binary
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_binary import SMALL_MODEL

INTERRUPTED = 75


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return (*SMALL_MODEL, train_binary.make_data(tmp_path_factory.mktemp("data") / "words"))


@pytest.fixture(scope="module")
def undisturbed(flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train_binary.train(*flags, "--workdir=run", cwd=folder)
    return folder / "run"


def assert_same_run(run: Path, other: Path) -> None:
    assert train_binary.losses(run) == train_binary.losses(other)
    assert train_binary.losses(run, "val/loss") == train_binary.losses(other, "val/loss")
    summary, expected = (json.loads((r / "summary.json").read_text()) for r in (run, other))
    for key in ("step", "tokens", "train/loss", "val/loss"):
        assert summary[key] == expected[key], key
    state, expected_state = (
        torch.load(r / "checkpoints" / "step_00000024" / "state.pt", weights_only=True)
        for r in (run, other)
    )
    for name, tensor in expected_state["model"].items():
        assert torch.equal(state["model"][name], tensor), name
    for name, moments in expected_state["optimizer"].items():
        for key, tensor in moments.items():
            assert torch.equal(state["optimizer"][name][key], tensor), (name, key)


def assert_whole_tensorboard(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for name, steps in (("train/loss", range(1, 25)), ("val/loss", (10, 20, 24))):
        logged = {event.step: event.value for event in events.Scalars(name)}
        assert [event.step for event in events.Scalars(name)] == list(steps), name
        assert logged == pytest.approx(train_binary.losses(run, name))  # TensorBoard keeps fp32
    texts = {f"{name}/text_summary" for name in ("config", "command", "environment", "sample")}
    assert texts <= set(events.Tags()["tensors"])


def test_undisturbed_run_learns_and_logs_every_step(undisturbed: Path) -> None:
    losses = train_binary.losses(undisturbed)
    assert sorted(losses) == list(range(1, 25))
    assert losses[24] < losses[1]
    assert sorted(train_binary.losses(undisturbed, "val/loss")) == [10, 20, 24]
    assert_whole_tensorboard(undisturbed)


def test_killed_after_various_steps(
    flags: tuple[str, ...], undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    metrics = run / "metrics.jsonl"

    def logged() -> int:
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    for lines in (2, 9, 21):  # before the first checkpoint, between two, near the end
        process = train_binary.start(*flags, "--workdir=run", cwd=tmp_path)
        assert train_binary.wait_until(lambda: logged() >= lines, process)  # noqa: B023
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not (run / "summary.json").exists()
    train_binary.train(*flags, "--workdir=run", cwd=tmp_path)
    assert_same_run(run, undisturbed)
    assert_whole_tensorboard(run)


def test_killed_during_saves(flags: tuple[str, ...], undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    every_step = (*flags, "--config.trainer.save_every=1", "--workdir=run")
    cut_short = 0
    for attempt in range(8):
        if cut_short == 2:
            break
        process = train_binary.start(*every_step, cwd=tmp_path)
        seen: set[Path] = set()

        def saving() -> bool:
            seen.update((run / "checkpoints").glob(".tmp-step_*"))  # noqa: B023
            return len(seen) > 1  # noqa: B023  # not the first one, so that runs get on

        train_binary.wait_until(saving, process)
        time.sleep(0.001 * attempt)  # other moments of a save
        process.kill()
        process.wait()
        cut_short += any((run / "checkpoints").glob(".tmp-step_*"))
    assert cut_short > 0, "no kill hit a save"
    train_binary.train(*every_step, cwd=tmp_path)
    assert not list((run / "checkpoints").glob(".tmp-*"))
    assert_same_run(run, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_leaves(
    number: signal.Signals, flags: tuple[str, ...], undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = train_binary.start(*flags, "--workdir=run", cwd=tmp_path)
    metrics = run / "metrics.jsonl"
    assert train_binary.wait_until(
        lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 7, process
    )
    process.send_signal(number)
    assert process.wait() == INTERRUPTED
    output = (tmp_path / "output.txt").read_text()
    assert "stopped by a signal after step" in output
    assert "Traceback" not in output
    stopped_at = train_binary.checkpoint_steps(run)[-1]
    assert max(train_binary.losses(run)) == stopped_at < 24
    result = train_binary.run(*flags, "--workdir=run", cwd=tmp_path)
    assert result.returncode == 0
    assert f"continuing from step {stopped_at}" in result.stderr
    assert_same_run(run, undisturbed)


def test_finished_run_says_so_and_changes_nothing(
    flags: tuple[str, ...], undisturbed: Path
) -> None:
    before = train_binary.files(undisturbed)
    result = train_binary.run(*flags, f"--workdir={undisturbed}", cwd=undisturbed.parent)
    assert result.returncode == 0
    assert "this run has finished: step 24 of 24" in result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary == json.loads((undisturbed / "summary.json").read_text())
    assert train_binary.files(undisturbed) == before


def test_second_run_in_the_same_folder_is_refused(flags: tuple[str, ...], tmp_path: Path) -> None:
    endless = (*flags, "--config.trainer.max_steps=1000000", "--workdir=run")
    process = train_binary.start(*endless, cwd=tmp_path)
    try:
        lock = tmp_path / "run" / "metrics.jsonl"
        assert train_binary.wait_until(lock.exists, process)
        message = train_binary.error_line(*endless, cwd=tmp_path)
        assert f"is training in {tmp_path / 'run'}" in message
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
