"""The place where prepared data is made, from which it appears in its folder in one go.

    <folder>                            the prepared data
    .<folder>.partial/, .<folder>.lock  beside it while it is made
    <folder>/.partial/, <folder>/.lock  within it where the folder was there, empty: it may be a
                                        mount point, which cannot be replaced

A run holds the lock, and the next one continues its work. On a file system without locks, the
processes of one machine lock a file in its temporary folder instead, and each machine works in its
own folder, `.<folder>.partial-<machine>`. The first one that is ready puts its data in place.
"""

import contextlib
import errno
import hashlib
import os
import platform
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from flashtrain import files
from flashtrain.data.errors import DataError, cannot_read
from flashtrain.data.manifest import MANIFEST, Manifest

_POLL_SECONDS = 0.5
# The names in a mount point before anybody has written to it.
_OF_THE_SYSTEM = ("lost+found",)
_NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV)


def has_manifest(folder: Path) -> bool:
    """Whether something was prepared there, of any kind."""
    return os.path.lexists(folder / MANIFEST)


def beside(folder: Path, name: str) -> Path:
    """The hidden file or folder that belongs to `folder` while it is made."""
    if folder.is_dir() and not has_manifest(folder):
        return folder / f".{name}"
    return folder.with_name(f".{folder.name}.{name}")


def check_free(folder: Path) -> None:
    """Raises DataError where the folder holds files of others, or cannot be a folder."""
    try:
        names = [] if not os.path.lexists(folder) else os.listdir(folder)
    except FileNotFoundError:
        raise DataError(f"{folder} is a symbolic link to nothing; mend it") from None
    except OSError as error:
        raise cannot_read(folder, error) from error
    ours = _being_published(folder)
    strangers = sorted(
        name
        for name in names
        if not name.startswith(".") and name not in _OF_THE_SYSTEM and name not in ours
    )
    if strangers:
        others = f" and {len(strangers) - 1:,} more" if len(strangers) > 1 else ""
        raise DataError(
            f"{folder} holds other files than prepared data ({strangers[0]!r}{others}); choose"
            " another folder with --out"
        )


def make_parent(folder: Path) -> None:
    """Makes the folder in which `folder` is to be. Raises OSError."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error


def _being_published(folder: Path) -> set[str]:
    """The names of the files that a run was putting in place when it was killed."""
    names = set()
    for path in folder.glob(f".partial*/out/{MANIFEST}"):
        with contextlib.suppress(OSError, ValueError):
            files.check_regular(path)
            for split in Manifest.from_json(path.read_text(encoding="utf-8")).splits.values():
                names |= {split.file} | ({split.documents.file} if split.documents else set())
            names |= set(os.listdir(path.parent))
    return names


@contextlib.contextmanager
def occupied(folder: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """Holds the lock of a folder that is to be made; yields the folder in which to make it.

    The system releases the lock however this process ends.

    Args:
        say: called with a line if this has to wait.

    Raises:
        OSError: nothing can be written there.
    """
    make_parent(folder)
    partial = beside(folder, "partial")
    with contextlib.ExitStack() as stack:
        if not _wait_for(stack.enter_context(beside(folder, "lock").open("ab")), say):
            partial = partial.with_name(f"{partial.name}-{_machine()}")
            local = _local_lock(folder)
            if local is not None:
                stack.callback(os.close, local)
            if local is None or not _wait_for(local, say):
                partial = partial.with_name(f"{partial.name}-{uuid.uuid4().hex[:12]}")
        yield partial


def _wait_for(file: IO[Any] | int, say: Callable[[str], None]) -> bool:
    """Acquires a lock; False on a file system without locks."""
    waiting = False
    while True:
        try:
            return files.lock(file)
        except BlockingIOError:
            if not waiting:
                say("another process prepares it; waiting")
            waiting = True
            time.sleep(_POLL_SECONDS)


def _local_lock(folder: Path) -> int | None:
    """A file on this machine's own disk, which nearly always has locks."""
    digest = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()
    try:
        path = Path(tempfile.gettempdir(), f"flashtrain-{os.getuid()}-{digest[:16]}.lock")
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(path, flags, 0o600)
    except OSError:
        return None


def _machine() -> str:
    """A name that no other machine has: containers and images share host names."""
    return hashlib.sha256(f"{platform.node()} {uuid.getnode()}".encode()).hexdigest()[:12]


def publish(out: Path, folder: Path) -> bool:
    """Puts the files of `out` in place as `folder`; the manifest, which makes it whole, last.

    If several processes do so at once, one wins, with or without locks: a folder is renamed as a
    whole, and only one process can link the first file into a folder that exists.

    Returns:
        Whether it was this one.

    Raises:
        OSError: they cannot be written there.
    """
    files.flush_folder(out)
    if not folder.exists():
        try:
            out.rename(folder)
        except OSError:
            if not folder.exists():
                raise
        else:
            files.flush_folder(folder.parent)
            return True
    if has_manifest(folder):
        return False
    for name in sorted(os.listdir(out), key=lambda name: (name == MANIFEST, name)):
        if not _put(out / name, folder / name):
            return False
    files.flush_folder(folder)
    return True


def _put(source: Path, target: Path) -> bool:
    """Moves a file unless there is one; False where there is another."""
    try:
        os.link(source, target)
    except FileExistsError:
        return os.path.samefile(source, target)  # a run was killed here
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if target.exists():
            return False
        source.replace(target)
    return True
