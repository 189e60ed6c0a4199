"""Checkpoints that others have made, or put something beside: one line, and nothing is lost."""

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from flashtrain.distributed import World
from flashtrain.errors import UserError
from flashtrain.train import checkpoint, manifest
from flashtrain.train.checkpoint import Reader
from flashtrain.train.config import TrainerConfig
from flashtrain.train.saver import Held, Saver


def save(folder: Path, step: int, tensors: Mapping[str, Held] | None = None, keep: int = 2) -> Path:
    world = World(0, 1, 0, 1, torch.device("cpu"))
    writer = Saver(folder, world, TrainerConfig(keep_checkpoints=keep))
    writer.save(step, tensors or {"x": Held(torch.ones(3))}, {})
    writer.wait()
    return checkpoint.path_of(folder, step)


def _zero(path: Path) -> dict[str, Any]:
    (path / "zero").symlink_to("/dev/zero")
    return {"files": {"zero": {"bytes": 0, "sha256": "", "first_rows": {}}}}


def _outside(path: Path) -> dict[str, Any]:
    (path.parent / "outside").write_bytes(b"")
    return {"files": {"../outside": {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}}}


def _pipe(path: Path) -> dict[str, Any]:
    os.mkfifo(path / "pipe")
    return {"files": {"pipe": {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}}}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_zero, "is a device, not a regular file"),
        (_outside, "'../outside' is not the name of a file in"),
        (_pipe, "is a pipe, not a regular file"),
        ({"files": {"/dev/zero": {"bytes": 0, "sha256": ""}}}, "is not the name of a file"),
        ({"files": {}}, "lists no files"),
        ({"files": ["x"]}, "lists no files"),
        ({"files": {"x": None}}, "says of 'x' None"),
        ({"files": {"x": {"bytes": -1, "sha256": ""}}}, "says of 'x'"),
        ({"files": {"x": {"bytes": 10**30, "sha256": ""}}}, "says of 'x'"),
        ({"files": {"x": {"bytes": 0, "sha256": "", "first_rows": {"w": "1"}}}}, "says of 'x'"),
        ({"files": {"": {"bytes": 0, "sha256": ""}}}, "'' is not the name of a file"),
        ({"step": 10**30}, "has the step 1000"),
        ({"step": True}, "has the step True"),
        ({"step": None}, "has the step None"),
    ],
)
def test_a_signed_manifest_may_say_anything(change: Any, reason: str, tmp_path: Path) -> None:
    """It is refused in one line, whatever it lists: nothing but files of the folder is opened."""
    path = save(tmp_path, 1)
    content = manifest.read(path) | (change(path) if callable(change) else change)
    manifest.write(path, content)
    with pytest.raises(UserError) as caught:
        checkpoint.read(path)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_never_ends_is_not_read(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "manifest.json").unlink()
    for make in (os.mkfifo, lambda name: os.symlink("/dev/zero", name), os.mkdir):
        make(path / "manifest.json")
        with pytest.raises(UserError, match="not a regular file"):
            checkpoint.read(path)
        remove = os.rmdir if make is os.mkdir else os.unlink
        remove(path / "manifest.json")
    (path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        checkpoint.read(path)


@pytest.mark.parametrize(
    ("first_rows", "pieces"),
    [
        ({"w": 1}, 1),  # begins late
        ({"w": 0}, 2),  # the same rows twice
        ({}, 2),  # the whole tensor twice
    ],
)
def test_rows_must_fit_together(first_rows: dict[str, int], pieces: int, tmp_path: Path) -> None:
    path = save(tmp_path, 3, {"w": Held(torch.ones(4, 2), 0)})
    content = manifest.read(path)
    entry = content["files"]["rank_00000.safetensors"] | {"first_rows": first_rows}
    for rank in range(pieces):
        name = f"rank_{rank:05d}.safetensors"
        (path / name).write_bytes((path / "rank_00000.safetensors").read_bytes())
        content["files"][name] = entry
    manifest.write(path, content)
    with pytest.raises(UserError, match="the rows of 'w' do not fit together"):
        Reader(checkpoint.read(path))


def test_weights_that_are_no_floating_point_numbers_are_refused(tmp_path: Path) -> None:
    bias = torch.ones(2, dtype=torch.int64)
    path = save(tmp_path, 1, {"model.weight": Held(torch.ones(2, 3)), "model.bias": Held(bias)})
    with pytest.raises(UserError, match="'bias' holds no floating-point numbers"):
        checkpoint.load_weights(checkpoint.read(path), torch.nn.Linear(3, 2))


def test_pruning_removes_only_what_a_save_has_written(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=9)
    (tmp_path / "step_00000002" / "notes.txt").write_text("mine")
    shutil.copytree(tmp_path / "step_00000003", tmp_path / "step_3")
    (tmp_path / "step_00000000").symlink_to("step_00000001")
    save(tmp_path, 5, keep=2)
    expected = ["step_00000000", "step_00000002", "step_00000004", "step_00000005", "step_3"]
    assert sorted(os.listdir(tmp_path)) == expected
