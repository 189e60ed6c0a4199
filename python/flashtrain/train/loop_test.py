"""The loop in this process, disturbed between any two of its steps."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flashtrain.data.token_files import write_token_files
from flashtrain.errors import RunInterruptedError, TrainingDivergedError, UserError
from flashtrain.train import checkpoint, evaluation, loop, run_log
from flashtrain.train.config import RunConfig
from flashtrain.train.log_file import LogFile
from flashtrain.train.step import TrainStep


@pytest.fixture(scope="module", autouse=True)
def one_thread_and_its_signals() -> Iterator[None]:
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is too small to share
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "words"
    tokens = np.frombuffer(b"to be or not to be " * 200, np.uint8)
    splits = {"train": tokens, "val": tokens[:100]}
    write_token_files(folder, splits, tokenizer="bytes", vocab_size=256, source={"name": "words"})
    return folder


@pytest.fixture
def train(data: Path, tmp_path: Path) -> Callable[..., None]:
    """Trains a tiny model in `tmp_path / "run"` up to step 6; changes: <section>__<key>=value."""

    def run(workdir: Path = tmp_path / "run", **changes: Any) -> None:
        sections: dict[str, dict[str, Any]] = {
            "model": {"d_model": 16, "num_layers": 1, "num_heads": 2},
            "data": {"path": str(data), "seed": 1, "seq_len": 16, "batch_size": 2},
            "optim": {"lr": 1e-3},
            "trainer": {
                "max_steps": 6,
                "global_batch_size": 2,
                "save_every": 2,
                "eval_every": 3,
                "sample_tokens": 0,
                "log_every": 1,
                "device": "cpu",
            },
        }
        for name, value in changes.items():
            section, key = name.split("__")
            sections[section][key] = value
        loop.train(RunConfig.from_mapping("test", sections), workdir, ["train"])

    return run


def after_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[Any], None]) -> None:
    """Has `act` called with the optimizer when the update of that step, from 1 on, is done."""
    call = TrainStep.__call__

    def step(self: TrainStep, step: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        values = call(self, step, *args, **kwargs)
        if step + 1 == number:
            act(self._optimizer)
        return values

    monkeypatch.setattr(TrainStep, "__call__", step)


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in checkpoint.paths(folder))


def logged(run: Path, name: str) -> list[int]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if name in line]


def spoil_weights(optimizer: Any) -> None:
    optimizer.owned[0].tensor.data.view(-1)[3] = float("nan")


def spoil_moments(optimizer: Any) -> None:
    optimizer.state(optimizer.owned[-1])["exp_avg_sq"].view(-1)[0] = float("inf")


@pytest.mark.parametrize("spoil", [spoil_weights, spoil_moments])
def test_weights_or_moments_that_are_not_finite_are_not_saved(
    spoil: Callable[[Any], None],
    train: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    after_step(monkeypatch, 4, spoil)
    with pytest.raises(TrainingDivergedError) as caught:
        train()
    assert "not finite after step 4, which is not saved; the last good" in str(caught.value)
    assert f"of step 2, is kept in {tmp_path / 'run' / 'checkpoints'}" in str(caught.value)
    assert steps(tmp_path / "run" / "checkpoints") == [2]


def test_the_line_says_where_no_checkpoint_was_saved_before(
    train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_step(monkeypatch, 1, spoil_weights)
    with pytest.raises(TrainingDivergedError, match="which is not saved; no checkpoint was saved"):
        train()
    assert steps(tmp_path / "run" / "checkpoints") == []
    with pytest.raises(TrainingDivergedError, match="up to step 3; no checkpoint was saved"):
        train(trainer__save_every=0, trainer__max_bad_steps=2)


def test_the_end_and_a_signal_save_nothing_that_is_not_finite(
    train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_step(monkeypatch, 6, spoil_weights)
    with pytest.raises(TrainingDivergedError, match="after step 6"):
        train()
    assert steps(tmp_path / "run" / "checkpoints") == [2, 4]

    def stop(optimizer: Any) -> None:
        spoil_weights(optimizer)
        os.kill(os.getpid(), signal.SIGTERM)

    after_step(monkeypatch, 5, stop)  # the next step is the one that hands it on
    with pytest.raises(TrainingDivergedError, match="after step 6"):
        train()
    assert steps(tmp_path / "run" / "checkpoints") == [2, 4]


def test_a_checkpoint_that_is_not_finite_is_not_gone_on_from(
    train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("flashtrain.train.state.RunState.are_finite", lambda *_: True)
        after_step(patch, 6, spoil_weights)
        train()
    with pytest.raises(TrainingDivergedError, match="step_00000006 are not finite; move it out"):
        train(trainer__max_steps=8)


def test_saves_before_it_measures(
    train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A benchmark's file that has gone loses no step, and the results come when it is back."""
    run, text = tmp_path / "run", tmp_path / "wiki.test.raw"
    text.write_text("to be or not to be")
    validate = evaluation.validate

    def then_remove(*args: Any) -> Any:
        text.unlink(missing_ok=True)
        return validate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "validate", then_remove)
        with pytest.raises(UserError) as caught:
            train(trainer__benchmarks=f"wikitext={text}", trainer__eval_every=0)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert message.startswith("step 6 is saved, but could not be measured: ")
    assert str(text) in message
    assert steps(run / "checkpoints") == [4, 6]
    text.write_text("to be or not to be")
    train(trainer__benchmarks=f"wikitext={text}", trainer__eval_every=0)
    assert json.loads((run / "summary.json").read_text())["eval/wikitext/perplexity"] > 1
    assert logged(run, "val/loss") == [6]
    assert logged(run, "eval/wikitext/perplexity") == [6]


def test_what_is_measured_after_a_save_is_in_the_checkpoint(
    train: Callable[..., None], tmp_path: Path
) -> None:
    train(trainer__save_every=3, trainer__keep_best=1)
    for step in (3, 6):
        found = checkpoint.read(checkpoint.path_of(tmp_path / "run" / "checkpoints", step))
        assert found.state["progress"]["val_step"] == step
        assert found.state["progress"]["metrics"]["loss"] > 0


def test_results_that_a_killed_process_logged_are_logged_once(
    train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed when it had logged them, before the checkpoint had them."""

    class KilledError(Exception):
        pass

    def kill(*_: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("flashtrain.train.saver.Saver.amend", kill)
        with pytest.raises(KilledError):
            train(trainer__save_every=3)
    assert logged(tmp_path / "run", "val/loss") == [3]
    train(trainer__save_every=3)
    assert logged(tmp_path / "run", "val/loss") == [3, 6]
    assert logged(tmp_path / "run", "train/loss") == [1, 2, 3, 4, 5, 6]


def test_a_log_that_cannot_be_written_does_not_end_the_run(
    train: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write, full = os.write, [False]

    def write_if_there_is_room(descriptor: int, content: bytes) -> int:
        if full[0]:
            raise OSError(28, os.strerror(28))
        return write(descriptor, content)

    monkeypatch.setattr("flashtrain.train.log_file.os.write", write_if_there_is_room)
    after_step(monkeypatch, 1, lambda _: full.__setitem__(0, True))
    after_step(monkeypatch, 4, lambda _: full.__setitem__(0, False))
    train()
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("the log in")]
    assert len(lines) == 2
    assert "cannot be written: the disk is full; free space there; training goes on" in lines[0]
    assert lines[1].endswith("goes on from step 4")
    assert logged(tmp_path / "run", "train/loss") == [1, 2, 3, 4, 5, 6]
    assert steps(tmp_path / "run" / "checkpoints") == [4, 6]


def test_a_record_is_whole_or_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = LogFile(tmp_path / "log")
    file.append(b"one\n")
    write = os.write
    left = [2]

    def write_two_bytes(descriptor: int, content: bytes) -> int:
        if not left[0]:
            raise OSError(28, os.strerror(28))
        left[0] -= 1
        return write(descriptor, content[:1])

    with monkeypatch.context() as patch:
        patch.setattr("flashtrain.train.log_file.os.write", write_two_bytes)
        with pytest.raises(OSError, match="No space left"):
            file.append(b"two\n")
    assert (tmp_path / "log").read_bytes() == b"one\n"
    file.append(b"three\n")
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\nthree\n"
    file.close()


def test_a_folder_that_is_removed_is_made_again(
    train: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    after_step(monkeypatch, 5, lambda _: shutil.rmtree(run))
    train(trainer__save_every=0)
    assert f"{run} was removed while the run goes on; it is made again" in capfd.readouterr().err
    assert steps(run / "checkpoints") == [6]
    assert (run / ".lock").read_text().strip() == str(os.getpid())
    assert json.loads((run / "summary.json").read_text())["step"] == 6
    assert list((run / "tensorboard").iterdir())
    assert logged(run, "val/loss") == [6]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves(
    number: signal.Signals,
    train: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    after_step(monkeypatch, 2, lambda _: os.kill(os.getpid(), number))
    with pytest.raises(RunInterruptedError):
        train(trainer__save_every=0)
    assert steps(tmp_path / "run" / "checkpoints") == [3]
    monkeypatch.undo()
    train()
    assert logged(tmp_path / "run", "train/loss") == [1, 2, 3, 4, 5, 6]


def test_a_signal_while_the_end_is_measured_leaves_it_to_the_next_start(
    train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_step(monkeypatch, 6, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(RunInterruptedError):
        train()
    assert not (tmp_path / "run" / "summary.json").exists()
    monkeypatch.undo()
    train()
    assert logged(tmp_path / "run", "val/loss") == [3, 6]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["step"] == 6


def test_texts_that_are_not_utf8_are_logged(train: Callable[..., None], tmp_path: Path) -> None:
    folder = run_log.RunFolder(tmp_path)
    with run_log.RunLog(folder, step=0, max_steps=1) as log:
        log.text(0, "command", "train --workdir=\udcff")
        log.hyperparameters({"data.path": "\udcff"}, metrics=())
    assert list((tmp_path / "tensorboard").iterdir())
