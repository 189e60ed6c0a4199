"""The manifest of a checkpoint, which is not trusted: it may come from anywhere.

Its checksum identifies the checkpoint, so a folder that was copied, renamed or linked is the same
checkpoint. Only regular files directly inside the folder are opened.
"""

import concurrent.futures
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashtrain import files
from flashtrain.errors import UserError
from flashtrain.train import tensor_file

FORMAT = 2
NAME = "manifest.json"
_LARGEST_BYTES = 256 << 20  # those of thousands of ranks have a few megabytes
_LARGEST_NUMBER = 2**63
_VERIFY_THREADS = 8


class DamagedError(Exception):
    """A checkpoint that differs from the written one; the message names the file and the reason."""


def checksum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 over everything in a manifest except the checksum itself."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Signs a manifest and puts it into its folder, durably, in one go.

    Raises:
        OSError: it could not be written; one that was there before is untouched.
    """
    signed = {**manifest, "sha256": checksum(manifest)}
    files.write(folder / NAME, json.dumps(signed).encode())


def read(folder: Path) -> dict[str, Any]:
    """The manifest in a folder: its format, checksum, step and list of files are right.

    Raises:
        DamagedError: it is missing or differs from the written one.
        UserError: it is of another format.
    """
    found = _parse(folder / NAME)
    if not isinstance(found, dict) or type(found.get("format")) is not int:
        raise DamagedError(f"{NAME} is not that of a checkpoint")
    if found["format"] != FORMAT:
        raise UserError(
            f"checkpoint {folder} has format {found['format']}, this version reads {FORMAT}: "
            "use the version that wrote it"
        )
    if checksum(found) != found.get("sha256"):
        raise DamagedError(f"{NAME} has another checksum than was written")
    if not _is_count(found.get("step")):
        raise DamagedError(f"{NAME} has the step {found.get('step')!r:.40}")
    listed = found.get("files")
    if not isinstance(listed, dict) or not listed:
        raise DamagedError(f"{NAME} lists no files")
    for name, entry in listed.items():
        if not _is_entry(entry):
            raise DamagedError(f"{NAME} says of {name!r:.80} {entry!r:.80}")
    return found


def check_sizes(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises DamagedError where a listed file is missing, has another size, or is no file of the
    folder."""
    for name, expected in manifest["files"].items():
        try:
            size = files.inside(folder, name).stat().st_size
        except FileNotFoundError as error:
            raise DamagedError(f"{name} is missing") from error
        except OSError as error:
            raise DamagedError(f"{name}: {files.cause(error)}") from error
        except ValueError as error:
            raise DamagedError(str(error)) from error
        if size != expected["bytes"]:
            raise DamagedError(f"{name} has {size} bytes instead of {expected['bytes']}")


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Reads every listed file. Raises DamagedError where one differs from the written one."""
    check_sizes(folder, manifest)
    listed = manifest["files"]
    try:
        with concurrent.futures.ThreadPoolExecutor(_VERIFY_THREADS) as pool:
            digests = list(pool.map(lambda name: tensor_file.checksum(folder / name), listed))
    except OSError as error:
        raise DamagedError(f"{error.filename}: {files.cause(error)}") from error
    for (name, expected), digest in zip(listed.items(), digests, strict=True):
        if digest != expected["sha256"]:
            raise DamagedError(f"{name} has another checksum than was written")


def _parse(path: Path) -> Any:
    try:
        files.check_regular(path)
        with open(path, "rb") as file:
            content = file.read(_LARGEST_BYTES + 1)
        if len(content) > _LARGEST_BYTES:
            raise DamagedError(f"{NAME} has more than {_LARGEST_BYTES} bytes")
        return json.loads(content)
    except FileNotFoundError as error:
        raise DamagedError(f"{NAME} is missing") from error
    except OSError as error:
        raise DamagedError(f"{NAME}: {files.cause(error)}") from error
    except RecursionError as error:
        raise DamagedError(f"{NAME} is nested too deeply") from error
    except ValueError as error:
        raise DamagedError(f"{NAME}: {error}") from error


def _is_entry(entry: Any) -> bool:
    """Whether this is said of a file: its size, checksum, and where pieces begin in tensors."""
    if not isinstance(entry, dict):
        return False
    rows = entry.get("first_rows", {})
    return (
        _is_count(entry.get("bytes"))
        and isinstance(entry.get("sha256"), str)
        and isinstance(rows, dict)
        and all(_is_count(row) for row in rows.values())
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST_NUMBER
