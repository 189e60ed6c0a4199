"""Files that survive a crash, on the file systems that clusters have.

Some mounts refuse operations that local disks have: Lustre without `-o flock` and old NFS have no
locks, and CIFS and FUSE cannot fsync a folder. Nothing that was written is at risk there, so these
calls go on without. Where something is at risk they raise the OSError, and `cause` says in words
what it means and what to do.
"""

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import IO, Any

# What a file system answers that does not have an operation at all.
_NOT_SUPPORTED = frozenset(
    {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.EBADRQC}
)
_NO_LOCKS = _NOT_SUPPORTED | {errno.ENOLCK}

_CAUSES = {
    errno.ENOSPC: "the disk is full; free space there",
    errno.EDQUOT: "the disk quota is used up; free space there",
    errno.EFBIG: "the file would be larger than the file system or `ulimit -f` allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.ENOENT: "a folder of the path does not exist (any more)",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "it is a folder, not a file",
    errno.ENAMETOOLONG: "the name is too long for the file system",
    errno.ELOOP: "the path has a loop of symbolic links",
    errno.EMFILE: "this process has too many open files; raise `ulimit -n`",
    errno.ENFILE: "the machine has too many open files",
    errno.ESTALE: "the network file system lost the file (stale handle); mount it again",
    errno.EIO: "the disk reported an I/O error; check it (dmesg)",
    errno.ENOLCK: "the file system has no locks",
    errno.ENOMEM: "the machine is out of memory",
}


def cause(error: OSError) -> str:
    """The true cause of an OSError in a few words, and what to do where that follows from it.

    Meant to stand after a colon: `f"cannot write {path}: {cause(error)}"`.
    """
    if error.errno is None:
        return str(error)
    return _CAUSES.get(error.errno) or error.strerror or os.strerror(error.errno)


def flush(file: IO[Any]) -> None:
    """Returns when the disk has what was written to the file.

    Raises:
        OSError: it could not be written.
    """
    file.flush()
    _fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Returns when the disk has the names in a folder, where the file system can say so.

    Raises:
        OSError: they could not be written.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        # A mount that has no fsync writes when it likes; that is its promise, not an error.
        if error.errno not in _NOT_SUPPORTED:
            raise


def write(path: Path, content: bytes) -> None:
    """Writes a file durably: killed at any moment, this leaves the file before it or the new one.

    Raises:
        OSError: it could not be written; the file before it is untouched.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            flush(file)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def lock(file: IO[Any] | int, *, wait: bool = False) -> bool:
    """Takes the exclusive lock of an open file or folder, held until it is closed.

    Returns:
        Whether it is held; False on a file system without locks.

    Raises:
        BlockingIOError: another process holds it, and `wait` is False.
        OSError: the lock could not be asked for.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def inside(folder: Path, name: Any) -> Path:
    """The path of a regular file that a manifest names, directly inside its folder.

    A manifest comes from anywhere, so a name that leads out of the folder, and what is no regular
    file (a pipe or a device, whose reading may never end), are refused. A symbolic link to a
    regular file is taken: caches of downloads are made of them.

    Raises:
        ValueError: the name is not one of a file in the folder, or not one of a regular file.
        OSError: there is no such file.
    """
    if not isinstance(name, str) or not name or "/" in name or "\0" in name or name in (".", ".."):
        raise ValueError(f"{name!r:.80} is not the name of a file in {folder}")
    path = folder / name
    check_regular(path)
    return path


def check_regular(path: Path) -> None:
    """Raises ValueError where a path is a pipe, a device, a socket or a folder, not a file.

    Raises:
        ValueError: it is not a regular file.
        OSError: it is not there.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is {_kind(mode)}, not a regular file")


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")
