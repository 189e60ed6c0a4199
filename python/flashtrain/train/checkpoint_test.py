import os
from pathlib import Path

import pytest
import torch

from flashtrain.errors import UserError
from flashtrain.train import checkpoint


def save(folder: Path, step: int, keep: int = 2) -> Path:
    return checkpoint.save(folder, step, {"x": torch.full((1000,), step)}, {"config": {}}, keep)


def never(line: str) -> None:
    raise AssertionError(f"unexpected warning: {line}")


def test_round_trip(tmp_path: Path) -> None:
    state = {
        "tensor": torch.arange(5, dtype=torch.bfloat16),
        "nested": {"list": [1, 2.5, "three", None], "tuple": (True, (1, 2))},
    }
    checkpoint.save(tmp_path, 7, state, {"config": {"a": 1}}, keep=1)
    found = checkpoint.newest(tmp_path, never)
    assert found is not None
    assert found.step == 7
    assert found.manifest["config"] == {"a": 1}
    loaded = found.load()
    assert torch.equal(loaded.pop("tensor"), state.pop("tensor"))
    assert loaded == state


def test_nothing_yet(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "missing", never) is None
    assert checkpoint.newest(tmp_path, never) is None


def test_keeps_the_newest_by_number(tmp_path: Path) -> None:
    for step in (8, 9, 10, 100_000_000, 11):
        save(tmp_path, step, keep=3)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["step_00000010", "step_00000011", "step_100000000"]


def test_unfinished_is_not_there_and_goes(tmp_path: Path) -> None:
    save(tmp_path, 1)
    half = tmp_path / ".tmp-step_00000002"
    half.mkdir()
    (half / "state.pt").write_bytes(b"half")
    found = checkpoint.newest(tmp_path, never)
    assert found is not None
    assert found.step == 1
    save(tmp_path, 2)
    assert not half.exists()
    found = checkpoint.newest(tmp_path, never)
    assert found is not None
    assert torch.equal(found.load()["x"], torch.full((1000,), 2))


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / "state.pt"
    content = path.read_bytes()
    for position in range(0, len(content), 97):
        altered = bytearray(content)
        altered[position] ^= 0x10
        path.write_bytes(altered)
        warnings: list[str] = []
        found = checkpoint.newest(tmp_path, warnings.append)
        assert found is not None
        assert found.step == 1
        assert len(warnings) == 1
        assert "checksum" in warnings[0]
    path.write_bytes(content)
    found = checkpoint.newest(tmp_path, never)
    assert found is not None
    assert found.step == 2


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"format": 1}', '{"format": "1"}', "null"])
def test_nonsense_manifest(manifest: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "manifest.json").write_text(manifest)
    warnings: list[str] = []
    found = checkpoint.newest(tmp_path, warnings.append)
    assert found is not None
    assert found.step == 1
    assert len(warnings) == 1


def test_renamed_checkpoint_is_damaged(tmp_path: Path) -> None:
    save(tmp_path, 1).rename(tmp_path / "step_00000005")
    with pytest.raises(UserError, match="every checkpoint in"):
        checkpoint.newest(tmp_path, lambda line: None)


def test_newer_format_is_an_error(tmp_path: Path) -> None:
    path = save(tmp_path, 1) / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(UserError, match="format 99, this version reads up to 1"):
        checkpoint.newest(tmp_path, never)


def test_full_disk_leaves_older_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="step_00000002: No space left on device; older"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_full_disk_while_writing(tmp_path: Path) -> None:
    """/dev/full refuses every write, inside torch.save as on a disk that is full."""
    save(tmp_path, 1)
    with pytest.raises(UserError, match="No space left on device"):
        _save_to_dev_full(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def _save_to_dev_full(folder: Path) -> None:
    real_mkdir = Path.mkdir

    def mkdir(self: Path, *args: object, **kwargs: object) -> None:
        real_mkdir(self, *args, **kwargs)  # type: ignore[arg-type]
        if self.name.startswith(".tmp-"):
            (self / "state.pt").symlink_to("/dev/full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "mkdir", mkdir)
        checkpoint.save(folder, 2, {"x": torch.zeros(1_000_000)}, {}, keep=2)
