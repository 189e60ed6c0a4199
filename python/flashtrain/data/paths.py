"""Paths of data on the user's disk."""

import glob
import os
import stat
from pathlib import Path

from flashtrain.data.errors import DataError, cannot_read


def user_path(path: str | os.PathLike[str]) -> Path:
    """The absolute form of `path`, with ~ expanded, relative to the user's current folder.

    `bazel run` starts programs in their runfiles folder and passes the user's in
    BUILD_WORKING_DIRECTORY.

    Raises:
        DataError: there is no such path, whatever is on the disk.
    """
    try:
        expanded = Path(path).expanduser()
    except RuntimeError as error:  # ~nobody
        raise DataError(f"{os.fspath(path)!r} is no path: {error}") from None
    if "\0" in str(expanded):
        raise DataError(f"{os.fspath(path)!r} is no path: it has a NUL character")
    if expanded.is_absolute():
        return expanded
    return _user_folder() / expanded


def _user_folder() -> Path:
    try:
        return Path(os.environ.get("BUILD_WORKING_DIRECTORY") or Path.cwd())
    except FileNotFoundError:
        raise DataError("the folder you are in has been deleted; change to another") from None


def cache_dir(source: str) -> Path:
    """The folder of a source's prepared files: ${DATA_DIR}/<source>, else ./data/<source>."""
    return user_path(os.environ.get("DATA_DIR") or "data") / source


def user_pattern(pattern: str) -> str:
    """The absolute form of a glob, as of `user_path`: the part before it is no pattern."""
    head, slash, tail = pattern.partition("/")
    if head.startswith("~"):
        return glob.escape(str(user_path(head))) + slash + tail
    return os.path.join(glob.escape(str(user_path(""))), pattern)


def matching_files(pattern: str) -> list[Path]:
    """The files that match an absolute glob, in alphabetical order; folders are skipped.

    Raises:
        DataError: a match is neither a file nor a folder, or a folder cannot be searched: leaving
            it out would train on less than was asked for.
    """
    parts = Path(pattern).parts
    for length in range(1, len(parts)):
        if not glob.has_magic(parts[length]):
            continue
        # glob itself skips folders that it may not read.
        for folder in glob.iglob(os.path.join(*parts[:length]), recursive=True):
            if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
                raise DataError(f"cannot read {folder}: permission denied")
    found = []
    for name in sorted(glob.glob(pattern, recursive=True)):
        try:
            mode = os.stat(name).st_mode
        except FileNotFoundError:
            raise DataError(f"{name} is a symbolic link to nothing; mend it") from None
        except OSError as error:
            raise cannot_read(name, error) from error
        if stat.S_ISREG(mode):
            found.append(Path(name))
        elif not stat.S_ISDIR(mode):
            raise DataError(f"{name} is a pipe, a device or a socket, not a file; match files only")
    return found
