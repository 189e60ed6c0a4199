"""The identity of a text is the content of its files, not their names, sizes or times.

Reading a whole corpus needs minutes. So the sizes and times of its files are stored beside their
checksums, and the files are read again only where these have changed.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flashtrain.data.errors import cannot_read
from flashtrain.data.token_files import sha256_of

# The files of a text in its order, by split, or by name where the name decides the split.
Files = Mapping[str, Sequence[Path]]


@dataclasses.dataclass(frozen=True)
class Content:
    """The content of a text's files.

    Attributes:
        description: their number, bytes and joint checksum, for manifests.
        checksums: of each file.
    """

    description: dict[str, Any]
    checksums: dict[Path, str]


def look(files: Files) -> str:
    """A hash of sizes and times: it changes with every write to a file, and with a copy.

    Raises:
        DataError: a file is not there.
    """
    looks = hashlib.sha256()
    for key, of_key in files.items():
        for path in of_key:
            stat = _stat(path)
            fields = (key, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
            looks.update(json.dumps(fields).encode() + b"\n")
    return looks.hexdigest()


def total_bytes(files: Files) -> int:
    """The size of all files."""
    return sum(_stat(path).st_size for of_key in files.values() for path in of_key)


def read(files: Files) -> Content:
    """Reads every byte of the files.

    Raises:
        DataError: a file cannot be read.
    """
    paths = [path for of_key in files.values() for path in of_key]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        checksums = dict(zip(paths, threads.map(_checksum, paths), strict=True))
    joint = hashlib.sha256()
    for key, of_key in files.items():
        for path in of_key:
            joint.update(json.dumps([key, checksums[path]]).encode() + b"\n")
    description = {
        "files": len(paths),
        "bytes": total_bytes(files),
        "sha256": joint.hexdigest(),
    }
    return Content(description, checksums)


def joint_checksum(paths: Iterable[Path], content: Content) -> str:
    """The checksum of some of the files."""
    checksums = "\n".join(content.checksums[path] for path in paths)
    return hashlib.sha256(checksums.encode()).hexdigest()


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise cannot_read(path, error) from error


def _checksum(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise cannot_read(path, error) from error
