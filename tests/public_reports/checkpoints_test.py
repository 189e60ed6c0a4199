"""Checkpoints and the runs that go on from them, as users of other projects have found them."""

import errno
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import train_binary

from flashtrain.errors import UserError
from flashtrain.train import checkpoint, loop
from flashtrain.train.config import RunConfig
from flashtrain.train.load_model import load_model

Train = Callable[..., None]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Trains a tiny model on words in `tmp_path / "run"`, in this process."""
    train_binary.make_data(tmp_path / "words")

    def run(max_steps: int, data: str = "words", **trainer: Any) -> None:
        sections: dict[str, dict[str, Any]] = {
            "model": {"d_model": 16, "num_layers": 1, "num_heads": 2},
            "data": {"path": str(tmp_path / data), "seed": 1, "seq_len": 16, "batch_size": 2},
            "trainer": {
                "max_steps": max_steps,
                "global_batch_size": 2,
                "eval_every": 0,
                "sample_tokens": 0,
                "device": "cpu",
                **trainer,
            },
        }
        loop.train(RunConfig.from_mapping("test", sections), tmp_path / "run", ["train"])

    return run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_mount_may_refuse_to_fsync_folders(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pytorch/pytorch#144752, untitaker/python-atomicwrites#28: CIFS and FUSE answer EINVAL."""
    fsync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    train(4, save_every=2)
    assert names(tmp_path / "run" / "checkpoints") == ["step_00000002", "step_00000004"]


def test_a_checkpoint_is_loaded_by_any_name(train: Train, tmp_path: Path) -> None:
    """tensorflow/tensorflow#25795: a checkpoint's folder that was renamed cannot be loaded."""
    train(1)
    written = tmp_path / "run" / "checkpoints" / "step_00000001"
    shutil.copytree(written, tmp_path / "my-gpt")
    (tmp_path / "latest").symlink_to(written)
    for name in ("my-gpt", "latest", written, "run", "run/checkpoints"):
        load_model(tmp_path / name, torch.device("cpu"))
    written.rename(tmp_path / "step_00000009")
    load_model(tmp_path / "step_00000009", torch.device("cpu"))
    with pytest.raises(UserError, match="latest holds no model: it is a link to nothing"):
        load_model(tmp_path / "latest", torch.device("cpu"))


def test_data_that_was_moved_is_the_same_data(train: Train, tmp_path: Path) -> None:
    """pykeen/pykeen#1022: a run is refused for a mismatch though nothing that matters changed."""
    train(1)
    (tmp_path / "words").rename(tmp_path / "moved")
    train(2, data="moved")
    train_binary.make_data(tmp_path / "words", train=20_000)
    with pytest.raises(UserError, match="the data is not that of the checkpoint"):
        train(3, data="words")


def test_folders_that_users_leave_beside_are_not_touched(
    train: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """pytorch/torchtitan#4292: copies beside checkpoints are loaded, or removed as old ones."""
    train(2, save_every=1, keep_checkpoints=1)
    folder = tmp_path / "run" / "checkpoints"
    beside = ["step_00000002.backup", "old-step_00000099", "step_00000099_best", "step_", "step_²"]
    for name in beside:
        shutil.copytree(folder / "step_00000002", folder / name)
    (folder / ".tmp-notes").write_text("mine")
    (folder / ".tmp-step_00000001").mkdir()  # of a process that was killed
    (folder / "step_00000001").symlink_to(tmp_path)
    train(4, save_every=1, keep_checkpoints=1)
    assert "continuing from step 2 " in capfd.readouterr().err
    kept = [*beside, ".tmp-notes", "step_00000001", "step_00000004"]
    assert names(folder) == sorted(kept)


@pytest.mark.parametrize("kind", ["file", "link", "pipe", "another step"])
def test_what_is_in_the_way_of_a_checkpoint_is_moved_aside(
    kind: str, train: Train, tmp_path: Path
) -> None:
    """pytorch/torchtitan#4292, further: whatever has the name of the next checkpoint."""
    train(1)
    folder = tmp_path / "run" / "checkpoints"
    blocked = folder / "step_00000002"
    if kind == "file":
        blocked.write_text("mine")
    elif kind == "link":
        blocked.symlink_to("nothing")
    elif kind == "pipe":
        blocked.mkdir()
        os.mkfifo(blocked / "manifest.json")
    else:
        shutil.copytree(folder / "step_00000001", blocked)
    train(2)
    assert names(folder) == ["step_00000001", "step_00000002", "step_00000002.damaged"]
    assert checkpoint.read(blocked).step == 2
