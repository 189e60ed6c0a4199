"""Checkpoints that were cut, altered, swapped or crafted: noticed and never trained on."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import train_binary
from train_binary import SMALL_MODEL

NEWEST, BEFORE = "step_00000024", "step_00000020"


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return (*SMALL_MODEL, train_binary.make_data(tmp_path_factory.mktemp("data") / "words"))


@pytest.fixture(scope="module")
def finished(flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train_binary.train(*flags, "--workdir=run", cwd=folder)
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, for the test to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_holds_what_a_run_needs(finished: Path) -> None:
    path = finished / "checkpoints" / NEWEST
    manifest = json.loads((path / "manifest.json").read_text())
    content = (path / "state.pt").read_bytes()
    assert manifest["files"]["state.pt"] == {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    assert manifest["step"] == 24
    assert manifest["config"]["model"]["d_model"] == 32
    assert {"torch", "python", "flashtrain"} <= manifest["versions"].keys()
    state = torch.load(path / "state.pt", weights_only=True)
    assert state.keys() == {"model", "optimizer", "scaler", "rng", "progress"}
    assert {"python", "numpy", "torch"} <= state["rng"].keys()
    assert state["progress"]["step"] == 24
    assert torch.serialization.get_unsafe_globals_in_checkpoint(path / "state.pt") == []


def test_keeps_the_newest(finished: Path) -> None:
    assert train_binary.checkpoint_steps(finished) == [20, 24]


@pytest.mark.parametrize(
    ("damage", "name", "reason"),
    [
        (flip_a_bit, "state.pt", "state.pt has another checksum than was written"),
        (cut, "state.pt", "state.pt has "),
        (Path.unlink, "state.pt", "FileNotFoundError"),
        (cut, "manifest.json", "JSONDecodeError"),
        (Path.unlink, "manifest.json", "FileNotFoundError"),
    ],
)
def test_damaged_newest_is_passed_over(
    damage, name: str, reason: str, flags: tuple[str, ...], run: Path, finished: Path
) -> None:
    damage(run / "checkpoints" / NEWEST / name)
    result = train_binary.run(*flags, f"--workdir={run}", cwd=run.parent)
    assert result.returncode == 0, result.stderr
    first, second = result.stderr.splitlines()[:2]
    assert first.startswith(f"checkpoint {run / 'checkpoints' / NEWEST} is damaged ({reason}")
    assert second.startswith("continuing from step 20")
    assert train_binary.losses(run) == train_binary.losses(finished)
    # What was damaged is whole again.
    state, expected = (
        torch.load(r / "checkpoints" / NEWEST / "state.pt", weights_only=True)
        for r in (run, finished)
    )
    assert all(torch.equal(state["model"][k], v) for k, v in expected["model"].items())


def test_no_whole_checkpoint_is_an_error(flags: tuple[str, ...], run: Path) -> None:
    for name in (NEWEST, BEFORE):
        flip_a_bit(run / "checkpoints" / name / "state.pt")
    before = train_binary.files(run)
    result = train_binary.run(*flags, f"--workdir={run}", cwd=run.parent)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(
        f"error: every checkpoint in {run / 'checkpoints'} is damaged"
    )
    assert "Traceback" not in result.stderr
    assert train_binary.files(run) == before


def test_contradicting_config_is_refused(flags: tuple[str, ...], run: Path) -> None:
    before = train_binary.files(run)
    message = train_binary.error_line(
        *flags,
        "--config.model.num_layers=3",
        "--config.optim.lr=0.5",
        f"--workdir={run}",
        cwd=run.parent,
    )
    assert message == (
        f"the config contradicts the checkpoint {run / 'checkpoints' / NEWEST} in "
        "model.num_layers (checkpoint: 2, now: 3), optim.lr (checkpoint: 0.003, now: 0.5); "
        "give the same values or choose another --workdir"
    )
    assert train_binary.files(run) == before


def _replace_state(run: Path, state: object) -> None:
    """A state that was not saved by the run, with a checksum that fits."""
    shutil.rmtree(run / "checkpoints" / BEFORE)
    path = run / "checkpoints" / NEWEST
    torch.save(state, path / "state.pt")
    content = (path / "state.pt").read_bytes()
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.pt"] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_another_models_weights_are_refused(flags: tuple[str, ...], run: Path) -> None:
    state = torch.load(run / "checkpoints" / NEWEST / "state.pt", weights_only=True)
    state["model"]["embedding.tokens.weight"] = torch.zeros(7, 32)
    _replace_state(run, state)
    before = train_binary.files(run)
    message = train_binary.error_line(*flags, f"--workdir={run}", cwd=run.parent)
    assert message == (
        f"the checkpoint {run / 'checkpoints' / NEWEST} is of another model: "
        "'embedding.tokens.weight' has shape (7, 32), in the model (256, 32); choose another "
        "--workdir"
    )
    assert train_binary.files(run) == before


class _Crafted:
    """What pickle would call when the file is loaded."""

    def __init__(self, witness: Path):
        self._witness = witness

    def __reduce__(self):
        return (Path.touch, (self._witness,))


def test_code_in_a_checkpoint_is_not_run(flags: tuple[str, ...], run: Path, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    _replace_state(run, {"model": _Crafted(witness)})
    message = train_binary.error_line(*flags, f"--workdir={run}", cwd=run.parent)
    assert "holds objects other than tensors and plain data" in message
    assert not witness.exists()


def test_longer_training_goes_on(flags: tuple[str, ...], run: Path) -> None:
    summary = train_binary.train(
        *flags, "--config.trainer.max_steps=30", f"--workdir={run}", cwd=run.parent
    )
    assert summary["step"] == 30
    assert sorted(train_binary.losses(run)) == list(range(1, 31))
