"""Checkpoints that were cut, altered, swapped or crafted: noticed and never trained on."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import train_binary
from safetensors.torch import load_file, save_file
from train_binary import SMALL_MODEL

from flashtrain.train import manifest

NEWEST, BEFORE = "step_00000024", "step_00000020"
RANK_0 = "rank_00000.safetensors"


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


def flip_a_digit(path: Path) -> None:
    """Still JSON, with another value."""
    text = path.read_text()
    assert '"bad_in_a_row": 0' in text
    path.write_text(text.replace('"bad_in_a_row": 0', '"bad_in_a_row": 1'))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_holds_what_a_run_needs(finished: Path) -> None:
    path = finished / "checkpoints" / NEWEST
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", RANK_0]
    found = manifest.read(path)
    content = (path / RANK_0).read_bytes()
    assert found["files"][RANK_0] == {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "first_rows": {},
    }
    assert found["step"] == 24
    assert found["config"]["model"]["d_model"] == 32
    assert found["data"].keys() == {"tokenizer", "vocab_size", "fingerprint"}
    assert {"torch", "python", "flashtrain"} <= found["versions"].keys()
    assert found["state"].keys() == {"progress", "loss_scale", "guard", "rng"}
    assert {"python", "numpy", "torch"} <= found["state"]["rng"].keys()
    assert found["state"]["progress"]["step"] == found["state"]["progress"]["val_step"] == 24
    tensors = load_file(path / RANK_0)
    weights = {n.removeprefix("model.") for n in tensors if n.startswith("model.")}
    assert "blocks.1.mlp.fc2.weight" in weights
    assert tensors.keys() == {
        name
        for weight in weights
        for name in (
            f"model.{weight}",
            *(f"optimizer.{weight}.{key}" for key in ("exp_avg", "exp_avg_sq", "step")),
        )
    }


def test_keeps_the_newest(finished: Path) -> None:
    assert train_binary.checkpoint_steps(finished) == [20, 24]


@pytest.mark.parametrize(
    ("damage", "name", "reason"),
    [
        (flip_a_bit, RANK_0, f"{RANK_0} has another checksum than was written"),
        (cut, RANK_0, f"{RANK_0} has "),
        (Path.unlink, RANK_0, f"{RANK_0} is missing"),
        (flip_a_digit, "manifest.json", "manifest.json has another checksum than was written"),
        (cut, "manifest.json", "manifest.json: "),
        (Path.unlink, "manifest.json", "manifest.json is missing"),
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
    train_binary.assert_same_run(run, finished)  # what was damaged is whole again


def test_no_whole_checkpoint_is_an_error(flags: tuple[str, ...], run: Path) -> None:
    for name in (NEWEST, BEFORE):
        flip_a_bit(run / "checkpoints" / name / RANK_0)
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


def _replace_file(run: Path, write: Callable[[Path], object]) -> None:
    """A file that was not saved by the run, with checksums that fit."""
    shutil.rmtree(run / "checkpoints" / BEFORE)
    path = run / "checkpoints" / NEWEST
    write(path / RANK_0)
    content = (path / RANK_0).read_bytes()
    changed = manifest.read(path)
    changed["files"][RANK_0] |= {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    manifest.write(path, changed)


def test_another_models_weights_are_refused(flags: tuple[str, ...], run: Path) -> None:
    tensors = load_file(run / "checkpoints" / NEWEST / RANK_0)
    tensors["model.embedding.tokens.weight"] = torch.zeros(7, 32)
    _replace_file(run, lambda path: save_file(tensors, path))
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
    _replace_file(run, lambda path: torch.save({"model": _Crafted(witness)}, path))
    message = train_binary.error_line(*flags, f"--workdir={run}", cwd=run.parent)
    assert f"{RANK_0} is no safetensors file" in message
    assert not witness.exists()


def test_longer_training_goes_on(flags: tuple[str, ...], run: Path) -> None:
    summary = train_binary.train(
        *flags, "--config.trainer.max_steps=30", f"--workdir={run}", cwd=run.parent
    )
    assert summary["step"] == 30
    assert sorted(train_binary.losses(run)) == list(range(1, 31))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1.5 MB: room for two checkpoints and the logs, not for three."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a disk of its own")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_full_disk(
    ranks: int, flags: tuple[str, ...], finished: Path, small_disk: Path, tmp_path: Path
) -> None:
    """Ends with one line; what was saved stays, and the run goes on when there is room."""
    ballast = small_disk / "ballast"
    run = small_disk / "run"
    ballast.write_bytes(bytes(300_000))
    arguments = (*flags, f"--config.trainer.devices={ranks}", f"--workdir={run}")
    result = train_binary.run(*arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: cannot write "), result.stderr
    assert "the disk is full; free space there" in error
    assert error.endswith("start again with the same --workdir to go on")
    saved = train_binary.checkpoint_steps(run)
    assert saved
    assert saved[-1] < 24
    ballast.unlink()
    again = train_binary.run(*arguments, "--config.trainer.keep_checkpoints=1", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"continuing from step {saved[-1]}" in again.stderr
    if ranks == 1:
        train_binary.assert_same_run(run, finished)
    assert sorted(train_binary.losses(run)) == list(range(1, 25))


def test_keeps_the_best_and_every_nth(flags: tuple[str, ...], tmp_path: Path) -> None:
    train_binary.train(
        *flags,
        "--config.trainer.eval_every=5",
        "--config.trainer.keep_checkpoints=1",
        "--config.trainer.keep_every=10",
        "--config.trainer.keep_best=2",
        "--config.optim.lr=0.5",  # so that the loss is not lowest at the end
        "--config.optim.schedule=constant",
        "--workdir=run",
        cwd=tmp_path,
    )
    losses = train_binary.losses(tmp_path / "run", "val/loss")
    best = sorted((5, 10, 15, 20, 24), key=losses.__getitem__)[:2]
    assert train_binary.checkpoint_steps(tmp_path / "run") == sorted({10, 20, 24, *best})
