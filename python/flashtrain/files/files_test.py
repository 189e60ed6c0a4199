import errno
import os
import stat
from pathlib import Path

import pytest

from flashtrain import files


def test_write_replaces_in_one_go_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write(path, b"one")
    files.write(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a.json"]


def test_write_that_fails_leaves_the_file_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    files.write(path, b"one")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
        files.write(path, b"two")
    assert "free space" in files.cause(caught.value)
    assert path.read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_folder_that_cannot_be_fsynced_is_left_to_its_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    asked = []

    def refuse(descriptor: int) -> None:
        asked.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    files.flush_folder(tmp_path)
    assert asked == [True]


def test_an_error_of_the_disk_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        files.flush_folder(tmp_path)


def test_lock_holds_out_others_and_is_let_go_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("ab") as first:
        assert files.lock(first)
        with path.open("ab") as second, pytest.raises(BlockingIOError):
            files.lock(second)
    with path.open("ab") as third:
        assert files.lock(third)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gives_false(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def no_flock(file: object, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", no_flock)
    with (tmp_path / "lock").open("ab") as file:
        assert not files.lock(file)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "", ".", "..", "a\0b", None, 3])
def test_inside_refuses_names_that_lead_out(tmp_path: Path, name: object) -> None:
    with pytest.raises(ValueError, match="is not the name of a file in"):
        files.inside(tmp_path, name)


def test_inside_takes_regular_files_and_links_to_them_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "zero").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    assert files.inside(tmp_path, "file").read_text() == "x"
    assert files.inside(tmp_path, "link").read_text() == "x"
    for name, kind in (("zero", "a device"), ("pipe", "a pipe"), ("folder", "a folder")):
        with pytest.raises(ValueError, match=kind):
            files.inside(tmp_path, name)
    with pytest.raises(FileNotFoundError):
        files.inside(tmp_path, "missing")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission"),
        (errno.ENAMETOOLONG, "too long"),
        (errno.EXDEV, os.strerror(errno.EXDEV)),
    ],
)
def test_cause_says_what_happened_and_nothing_else(code: int, words: str) -> None:
    text = files.cause(OSError(code, os.strerror(code)))
    assert words in text
    assert ("free space" in text) == (code == errno.ENOSPC)
