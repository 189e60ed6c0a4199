"""The loop in this process, disturbed between any two of its steps."""

import functools
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

from flashtrain.data import DataError
from flashtrain.data.token_files import write_token_files
from flashtrain.errors import RunInterruptedError, TrainingDivergedError, UserError
from flashtrain.train import checkpoint, evaluation, loop, manifest
from flashtrain.train.config import RunConfig
from flashtrain.train.load_model import load_model
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


def train_in(workdir: Path, data: Path, **changes: Any) -> None:
    """Trains a tiny model up to step 6; changes: <section>__<key>=value."""
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


@pytest.fixture
def train(data: Path, tmp_path: Path) -> Callable[..., None]:
    return functools.partial(train_in, tmp_path / "run", data)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train_in(folder, data, trainer__max_steps=2, trainer__eval_every=0)
    return folder


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


def test_a_failure_between_steps_loses_none(
    train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise DataError("image 7 has gone")

    folder = tmp_path / "run" / "checkpoints"
    after_step(monkeypatch, 3, lambda _: monkeypatch.setattr(loop.BatchLoader, "next", gone))
    with pytest.raises(UserError, match="image 7"):
        train(trainer__save_every=0)
    assert steps(folder) == [3]
    monkeypatch.undo()
    monkeypatch.setattr(evaluation, "validate", gone)
    with pytest.raises(UserError, match="image 7"):
        train(trainer__save_every=0, trainer__eval_every=5)
    assert steps(folder) == [3, 5]

    def move_away(*_: object) -> dict[str, float]:  # as users do with what they keep elsewhere
        shutil.rmtree(folder)
        return {"loss": 1.0}

    monkeypatch.setattr(evaluation, "validate", move_away)
    train(trainer__eval_every=0)
    assert steps(folder) == []


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


def _changed(
    trained: Path, folder: Path, change: Callable[[dict[str, Any]], Any]
) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of a copy of the run, with another manifest, and that."""
    shutil.copytree(trained, folder / "run")
    path = checkpoint.path_of(folder / "run" / "checkpoints", 2)
    content = manifest.read(path)
    change(content)
    manifest.write(path, content)
    return path, content


def _set(section: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[section].__setitem__(key, value)


def _progress(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["state"]["progress"].__setitem__(key, value)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("state"),
        lambda content: content.pop("config"),
        lambda content: content.pop("data"),
        lambda content: content["state"].pop("rng"),
        _set("state", "progress", None),
        _set("state", "progress", {}),
        _set("state", "guard", {"mean": [1.0], "variance": [1.0, 1.0], "count": 1}),
        _set("state", "guard", {"mean": "x", "variance": None, "count": -1}),
        _set("state", "rng", {"python": [3, [1], None], "numpy": [], "torch": "00"}),
        _set("state", "rng", {"python": 1}),
        _progress("step", 3),
        _progress("step", -1),
        _progress("skipped_steps", 10**30),
        _progress("timed_steps", 1.5),
        _progress("metrics", {"loss": "low"}),
        _progress("no_such_key", 1),
        _set("config", "data", 7),
        _set("config", "model", []),
    ],
)
def test_a_signed_state_may_be_anything(
    change: Callable[[dict[str, Any]], None],
    train: Callable[..., None],
    trained: Path,
    tmp_path: Path,
) -> None:
    """It is refused in one line, with nothing changed."""
    path, content = _changed(trained, tmp_path, change)
    with pytest.raises(UserError) as caught:
        train(trainer__max_steps=3)
    assert caught.value.exit_code == 2
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert manifest.read(path) == content | {"sha256": manifest.checksum(content)}


@pytest.mark.parametrize(
    "change",
    [
        _set("config", "model", {"d_model": "wide"}),
        _set("config", "model", {"d_model": 10**12, "num_layers": 1, "num_heads": 1}),
        _set("config", "model", {"d_model": 16, "num_layers": 10**9, "num_heads": 2}),
        _set("config", "model", {"d_model": 16, "num_layers": 1, "num_heads": 0}),
        _set("config", "model", {"d_model": float("nan"), "num_layers": 1, "num_heads": 2}),
        _set("config", "model", None),
        _set("config", "data", {}),
        _set("data", "vocab_size", -1),
        _set("data", "vocab_size", 2**62),
        _set("data", "tokenizer", ["bytes"]),
        _set("data", "tokenizer", "../../secret"),
    ],
)
def test_a_signed_config_may_be_anything(
    change: Callable[[dict[str, Any]], None], trained: Path, tmp_path: Path
) -> None:
    path, _ = _changed(trained, tmp_path, change)
    with pytest.raises(UserError):
        load_model(path, torch.device("cpu"))
