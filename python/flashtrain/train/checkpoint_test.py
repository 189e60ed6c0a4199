"""Checkpoints on disk and the saver that writes them, in one process and as ranks would."""

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import pytest
import safetensors.torch
import torch

from flashtrain.distributed import World
from flashtrain.errors import UserError
from flashtrain.train import checkpoint, tensor_file
from flashtrain.train.checkpoint import Reader
from flashtrain.train.config import TrainerConfig
from flashtrain.train.saver import Held, Saver

CPU = torch.device("cpu")


def saver(folder: Path, rank: int = 0, size: int = 1, **keep: int) -> Saver:
    return Saver(folder, World(rank, size, rank, size, CPU), TrainerConfig(**keep))  # type: ignore[arg-type]


def save(folder: Path, step: int, loss: float | None = None, **keep: int) -> Path:
    progress = {
        "step": step,
        "val_step": step if loss is not None else 0,
        "metrics": {"loss": loss},
    }
    writer = saver(folder, **keep)
    tensors = {"x": Held(torch.full((1000,), step))}
    writer.save(step, tensors, {"config": {}, "state": {"progress": progress}})
    writer.wait()
    return checkpoint.path_of(folder, step)


def newest(folder: Path) -> checkpoint.Checkpoint:
    def never(line: str) -> None:
        raise AssertionError(f"unexpected warning: {line}")

    found = checkpoint.newest(folder, never)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8],
)
def test_round_trip(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.arange(35).reshape(5, 7).t().to(dtype),  # not contiguous
        "empty": torch.zeros(0, 3, dtype=dtype),
        "scalar": torch.tensor(3).to(dtype),
    }
    writer = saver(tmp_path)
    state = {"nested": [1, 2.5, "three", None, 0.1]}
    writer.save(7, {n: Held(t) for n, t in tensors.items()}, {"state": state})
    writer.wait()
    found = newest(tmp_path)
    assert (found.step, found.state) == (7, state)
    reader = Reader(found)
    assert sorted(reader.names("")) == sorted(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(reader.read(name), tensor), name
    assert torch.equal(reader.read("matrix", 2, 3), tensors["matrix"][2:5])
    # What others read with the format's own library.
    file = safetensors.torch.load_file(found.path / "rank_00000.safetensors")
    assert torch.equal(file["matrix"], tensors["matrix"])


def test_saves_what_the_tensors_held(tmp_path: Path) -> None:
    """Training continues in place while the copy is written."""
    tensor, writer = torch.zeros(1_000_000), saver(tmp_path)
    writer.save(1, {"x": Held(tensor)}, {})
    tensor.fill_(1.0)
    writer.wait()
    assert not Reader(newest(tmp_path)).read("x").any()


def save_rows(folder: Path, whole: torch.Tensor, cuts: list[int]) -> None:
    """As ranks that hold rows of a tensor would, all at once."""
    writers = [saver(folder, rank, len(cuts) - 1) for rank in range(len(cuts) - 1)]
    for rank, writer in reversed(list(enumerate(writers))):  # rank 0 has to wait for the others
        rows = whole[cuts[rank] : cuts[rank + 1]]
        writer.save(3, {"w": Held(rows, cuts[rank]), "count": Held(torch.tensor(2.0))}, {})
    for writer in writers:
        writer.wait()


@pytest.mark.parametrize("cuts", [[0, 10], [0, 5, 10], [0, 3, 6, 9, 10], [0, 9, 10, 10]])
def test_rows_are_read_by_any_number_of_ranks(cuts: list[int], tmp_path: Path) -> None:
    whole = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    save_rows(tmp_path, whole, cuts)
    reader = Reader(newest(tmp_path))
    assert reader.shape("w") == (10, 3)
    assert torch.equal(reader.read("w"), whole)
    assert reader.read("count") == 2.0
    for first in range(10):
        for rows in range(11 - first):
            assert torch.equal(reader.read("w", first, rows), whole[first : first + rows])


def test_is_not_there_before_every_rank_has_written(tmp_path: Path) -> None:
    first, second = saver(tmp_path, 0, 2), saver(tmp_path, 1, 2)
    first.save(1, {"a": Held(torch.ones(3))}, {})
    waiting = threading.Thread(target=first.wait)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    assert checkpoint.paths(tmp_path) == []
    second.save(1, {"b": Held(torch.ones(4))}, {})
    waiting.join(120)  # for a disk that is busy
    assert sorted(Reader(newest(tmp_path)).names("")) == ["a", "b"]


def test_nothing_yet(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "missing", print) is None
    assert checkpoint.newest(tmp_path, print) is None


def kept(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in folder.iterdir())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_keeps_the_newest_by_number(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11, 100_000_000):
        save(tmp_path, step, keep_checkpoints=3)
    assert kept(tmp_path) == [10, 11, 100_000_000]


def test_keeps_the_best_and_every_nth(tmp_path: Path) -> None:
    losses = {1: 5.0, 2: 3.0, 3: None, 4: 4.0, 5: 3.5, 6: 6.0, 7: float("nan"), 8: 9.0}
    for step, loss in losses.items():
        save(tmp_path, step, loss, keep_checkpoints=1, keep_best=2)
    assert kept(tmp_path) == [2, 5, 8]
    for step in range(9, 14):
        save(tmp_path, step, keep_checkpoints=2, keep_every=5)
    assert kept(tmp_path) == [5, 10, 12, 13]


def test_a_later_one_that_is_damaged_does_not_count(tmp_path: Path) -> None:
    """The run continued from the one before; it keeps its own checkpoints."""
    save(tmp_path, 1)
    (save(tmp_path, 9) / "manifest.json").write_text("{")
    save(tmp_path, 2, keep_checkpoints=1)
    assert kept(tmp_path) == [2, 9]
    save(tmp_path, 9, keep_checkpoints=1)
    assert names(tmp_path) == ["step_00000009", "step_00000009.damaged"]
    assert newest(tmp_path).step == 9


def test_one_that_the_run_removes_while_it_is_read_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    verified = checkpoint._verified

    def late(path: Path, step: int) -> checkpoint.Checkpoint:
        if step == 2:
            save(tmp_path, 3, keep_checkpoints=1)
        return verified(path, step)

    monkeypatch.setattr(checkpoint, "_verified", late)
    found = newest(tmp_path)
    assert found.step == 3
    save(tmp_path, 4, keep_checkpoints=1)
    with pytest.raises(UserError, match="step_00000003 was removed just now"):
        Reader(found)


def test_unfinished_is_not_there_and_goes(tmp_path: Path) -> None:
    save(tmp_path, 1)
    half = tmp_path / ".tmp-step_00000002"
    half.mkdir()
    (half / "rank_00000.safetensors").write_bytes(b"half")
    assert newest(tmp_path).step == 1
    checkpoint.remove_unfinished(tmp_path)
    assert kept(tmp_path) == [1]


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "manifest.json"])
def test_every_flipped_bit_is_noticed(name: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    content = path.read_bytes()
    for position in range(0, len(content), 1 + len(content) // 80):
        altered = bytearray(content)
        altered[position] ^= 1 << (position % 8)
        path.write_bytes(altered)
        warnings: list[str] = []
        found = checkpoint.newest(tmp_path, warnings.append)
        assert found is not None
        assert found.step == 1, position
        assert len(warnings) == 1
    path.write_bytes(content)
    assert newest(tmp_path).step == 2


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"format": 2}', '{"format": 2, "step": 2}'])
def test_nonsense_manifest(manifest: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "manifest.json").write_text(manifest)
    warnings: list[str] = []
    found = checkpoint.newest(tmp_path, warnings.append)
    assert found is not None
    assert found.step == 1
    assert len(warnings) == 1


def test_amended_after_it_was_saved(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        writer = saver(tmp_path, keep_checkpoints=1, keep_best=1)
        state: dict[str, Any] = {"progress": {"step": step}, "other": 7}
        writer.save(step, {"x": Held(torch.ones(1000))}, {"state": state})
        metrics = {"val_step": step, "metrics": {"loss": abs(step - 2)}}
        writer.amend({"progress": {"step": step} | metrics})
        writer.wait()
    assert kept(tmp_path) == [2, 3]
    assert newest(tmp_path).state == {"progress": {"step": 3} | metrics, "other": 7}


def test_another_steps_name_among_checkpoints_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1).rename(tmp_path / "step_00000005")
    warnings: list[str] = []
    with pytest.raises(UserError, match="every checkpoint in"):
        checkpoint.newest(tmp_path, warnings.append)
    assert "step_00000005 is damaged (manifest.json is of step 1)" in warnings[0]


def test_other_format_is_an_error(tmp_path: Path) -> None:
    path = save(tmp_path, 1) / "manifest.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 99'))
    with pytest.raises(UserError, match="format 99, this version reads 2"):
        checkpoint.newest(tmp_path, print)


def test_read_one(tmp_path: Path) -> None:
    assert checkpoint.read(save(tmp_path, 4)).step == 4
    with pytest.raises(UserError, match="step_00000005 is missing or damaged"):
        checkpoint.read(tmp_path / "step_00000005")


def model_checkpoint(folder: Path, **changes: Any) -> checkpoint.Checkpoint:
    tensors = {"model.weight": Held(torch.ones(2, 3)), "model.bias": Held(torch.ones(2))}
    tensors |= {name: Held(tensor) for name, tensor in changes.items()}
    writer = saver(folder)
    writer.save(1, tensors, {})
    writer.wait()
    return newest(folder)


def test_load_weights(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    average = {"ema.weight": torch.zeros(2, 3), "ema.bias": torch.zeros(2)}
    found = model_checkpoint(tmp_path, **average)
    checkpoint.load_weights(found, model)
    assert all(p.eq(1).all() for p in model.parameters())
    checkpoint.load_weights(found, model, ema=True)
    assert all(p.eq(0).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.extra": torch.ones(1)}, "has a tensor 'extra' that the model does not have"),
        ({"model.bias": torch.ones(3)}, r"'bias' has shape \(3,\), in the model \(2,\)"),
        ({"optimizer.bias.exp_avg": torch.ones(3)}, r"'optimizer.bias.exp_avg' has shape \(3,\)"),
        ({"optimizer.head.exp_avg": torch.ones(3)}, r"'optimizer.head.exp_avg' has shape \(3,\)"),
    ],
)
def test_another_models_weights_are_refused(changes: dict, message: str, tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    with pytest.raises(UserError, match=message):
        checkpoint.load_weights(model_checkpoint(tmp_path, **changes), model)
    assert torch.equal(model.weight, before)


def test_missing_average_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it lacks the model's tensor 'bias'"):
        checkpoint.load_weights(model_checkpoint(tmp_path), torch.nn.Linear(3, 2), ema=True)


@pytest.mark.parametrize(
    "name", ["rank_00000.safetensors", ".tmp-rank_00000.json", ".tmp-manifest.json"]
)
def test_full_disk_leaves_older_checkpoints(name: str, tmp_path: Path) -> None:
    """/dev/full refuses every write, as a disk that is full."""
    save(tmp_path, 1)
    temporary = tmp_path / ".tmp-step_00000002"
    temporary.mkdir()
    (temporary / name).symlink_to("/dev/full")
    writer = saver(tmp_path)
    writer.save(2, {"x": Held(torch.zeros(1_000_000))}, {})
    with pytest.raises(UserError, match="step_00000002: the disk is full; free space there; older"):
        writer.wait()
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    save(tmp_path, 2)
    assert kept(tmp_path) == [1, 2]


def test_a_full_disk_of_one_rank_is_told_by_that_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank, still writing, does not fail for what the first one has cleared away."""
    save(tmp_path, 1)
    temporary = tmp_path / ".tmp-step_00000002"
    temporary.mkdir()
    (temporary / "rank_00000.safetensors").symlink_to("/dev/full")
    began, failed, write = threading.Event(), threading.Event(), tensor_file.write

    def write_late(file: IO[bytes], tensors: Mapping[str, torch.Tensor]) -> dict[str, object]:
        if "b" in tensors:
            began.set()
            assert failed.wait(120)
        return write(file, tensors)

    monkeypatch.setattr(tensor_file, "write", write_late)
    first, second = saver(tmp_path, 0, 2), saver(tmp_path, 1, 2)
    second.save(2, {"b": Held(torch.ones(4))}, {})
    assert began.wait(120)
    first.save(2, {"a": Held(torch.zeros(1_000_000))}, {})
    with pytest.raises(UserError, match="step_00000002: the disk is full; free space there; older"):
        first.wait()
    failed.set()
    second.wait()
    assert newest(tmp_path).step == 1
    checkpoint.remove_unfinished(tmp_path)
    assert kept(tmp_path) == [1]


def test_failure_in_the_background_is_told_by_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    writer = saver(tmp_path)
    writer.save(1, {"x": Held(torch.zeros(3))}, {})
    assert writer._thread is not None
    writer._thread.join()
    with pytest.raises(UserError, match="the disk is full"):
        writer.check()
    writer.check()  # once


def test_manifest_says_where_everything_is(tmp_path: Path) -> None:
    save_rows(tmp_path, torch.ones(4, 2), [0, 2, 4])
    files = json.loads((tmp_path / "step_00000003" / "manifest.json").read_text())["files"]
    assert {name: entry["first_rows"] for name, entry in files.items()} == {
        "rank_00000.safetensors": {"w": 0},
        "rank_00001.safetensors": {"w": 2},
    }
