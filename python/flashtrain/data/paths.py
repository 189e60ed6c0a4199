"""Where data lies on the user's disk."""

import os
from pathlib import Path


def user_path(path: str | os.PathLike[str]) -> Path:
    """The absolute form of `path`, with ~ expanded and relative to the folder that the user is in.

    `bazel run` starts programs in their runfiles folder and passes the user's in
    BUILD_WORKING_DIRECTORY.
    """
    working_dir = os.environ.get("BUILD_WORKING_DIRECTORY") or Path.cwd()
    return Path(working_dir) / Path(path).expanduser()


def cache_dir(source: str) -> Path:
    """The folder of a source's prepared files: ${DATA_DIR}/<source>, else ./data/<source>."""
    return user_path(os.environ.get("DATA_DIR") or "data") / source
