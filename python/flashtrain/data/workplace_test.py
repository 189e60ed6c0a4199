"""Several processes put their data in one place: one wins, and nothing is ever mixed."""

import errno
import os
from pathlib import Path

import pytest

from flashtrain.data import DataError
from flashtrain.data.manifest import Manifest, Split
from flashtrain.data.workplace import check_free, occupied, publish

NAMES = ("train.bin", "val.bin", "manifest.json")


def made(folder: Path, content: str) -> Path:
    """A folder of files that all have the same content."""
    folder.mkdir(parents=True)
    for name in NAMES:
        (folder / name).write_text(content)
    return folder


def contents(folder: Path) -> set[str]:
    return {(folder / name).read_text() for name in NAMES}


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("links", [False, True])
def test_the_first_one_wins(tmp_path, monkeypatch, exists, links):
    folder = tmp_path / "prepared"
    if exists:
        folder.mkdir()
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    assert publish(made(tmp_path / "one", "1"), folder)
    assert not publish(made(tmp_path / "two", "2"), folder)
    assert contents(folder) == {"1"}


def refuse(*_: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_one_that_comes_while_another_is_at_it(tmp_path):
    folder = tmp_path / "prepared"
    folder.mkdir()
    one, two = made(tmp_path / "one", "1"), made(tmp_path / "two", "2")
    os.link(one / "train.bin", folder / "train.bin")
    assert not publish(two, folder)
    assert os.listdir(folder) == ["train.bin"]
    assert publish(one, folder)  # killed there, it continues
    assert contents(folder) == {"1"}


def test_a_folder_that_cannot_be_replaced(tmp_path, monkeypatch):
    """A mount point that appeared meanwhile."""
    folder = tmp_path / "prepared"
    out = made(tmp_path / "out", "1")

    def busy(self: Path, target: Path) -> Path:
        target.mkdir()
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(Path, "rename", busy)
    assert publish(out, folder)
    assert contents(folder) == {"1"}


def test_where_it_is_made(tmp_path):
    says: list[str] = []
    with occupied(tmp_path / "a" / "new", says.append) as partial:
        assert partial == tmp_path / "a" / ".new.partial"
    (tmp_path / "empty").mkdir()
    with occupied(tmp_path / "empty", says.append) as partial:
        assert partial == tmp_path / "empty" / ".partial"
    assert says == []


def test_without_locks_each_machine_has_its_own_place(tmp_path, monkeypatch):
    """Processes of one machine still hold each other out, by a lock in its temporary folder."""
    from flashtrain import files

    real = files.lock
    refused = []

    def on_local_files_alone(file, *, wait=False):
        if isinstance(file, int):
            return real(file, wait=wait)
        refused.append(file)
        return False

    monkeypatch.setattr(files, "lock", on_local_files_alone)
    with occupied(tmp_path / "new", lambda line: None) as first:
        assert first.name.startswith(".new.partial-")

        def stop(line: str) -> None:
            raise TimeoutError(line)

        with pytest.raises(TimeoutError, match="another process"), occupied(tmp_path / "new", stop):
            pass
    with occupied(tmp_path / "new", lambda line: None) as again:
        assert again == first
    monkeypatch.setattr(files, "lock", lambda file, *, wait=False: False)
    with occupied(tmp_path / "new", lambda line: None) as alone:
        assert alone != first
    assert refused


def test_what_is_free(tmp_path):
    check_free(tmp_path / "new")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"link is a symbolic link to nothing"):
        check_free(tmp_path / "link")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file: a part of the path is a file"):
        check_free(tmp_path / "file")
    folder = tmp_path / "folder"
    made(folder / ".partial" / "out", "1")
    (folder / "train.bin").touch()
    splits = {name: Split(f"{name}.bin", 1, "0" * 64) for name in ("train", "val")}
    manifest = Manifest("bytes", 256, "uint16", {}, splits)
    (folder / ".partial" / "out" / "manifest.json").write_text(manifest.to_json())
    check_free(folder)  # being published
    (folder / "b.txt").touch()
    (folder / "a.txt").touch()
    with pytest.raises(DataError, match=r"\('a\.txt' and 1 more\); choose another folder"):
        check_free(folder)
