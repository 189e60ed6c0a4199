"""Checkpoints that are whole or not there.

A checkpoint is a folder `step_<number>` with

    state.pt        torch.save of plain dicts, lists, numbers and tensors
    manifest.json   format, step, config, versions, and size and SHA-256 of each file

It is written beside its final place, fsynced, and renamed, so a process killed at any moment leaves
either the whole checkpoint or a `.tmp-*` folder that the next `save` removes. A file that was cut
or altered later no longer has its checksum and `newest` passes over it.

torch.save rather than torch.distributed.checkpoint: the latter keeps its index as a pickle, which
runs code when it is loaded, while `torch.load(weights_only=True)` does not. The format grows
without it: state is keyed by parameter name, so it does not know ranks; the manifest lists any
number of files, so each rank can add its own; and `save` takes a finished state, so a thread can
call it on a copy.
"""

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from flashtrain.errors import UserError

_FORMAT = 1
_PREFIX = "step_"
_STATE = "state.pt"
_MANIFEST = "manifest.json"


class DamagedError(Exception):
    """A checkpoint that is not what was written; the message says which file and why."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]

    def load(self) -> dict[str, Any]:
        """The saved state, on the CPU. Runs no code from the file.

        Raises:
            UserError: the file holds more than data, so it was not written by `save`.
        """
        try:
            return torch.load(self.path / _STATE, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"checkpoint {self.path / _STATE} holds objects other than tensors and plain data; "
                "it is not loaded, for it could run code: choose another --workdir"
            ) from error


def save(
    folder: Path, step: int, state: Mapping[str, Any], metadata: Mapping[str, Any], keep: int
) -> Path:
    """Writes `<folder>/step_<step>` and removes all but the newest `keep` checkpoints.

    Args:
        folder: holds the checkpoints of one run; made if missing.
        step: optimizer steps done.
        state: what `Checkpoint.load` gives back.
        metadata: further keys of the manifest; JSON data.
        keep: at least 1.

    Raises:
        UserError: the disk is full or not writable; older checkpoints are untouched.
    """
    final = folder / f"{_PREFIX}{step:08d}"
    temporary = folder / f".tmp-{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder)
        temporary.mkdir()
        with open(temporary / _STATE, "wb") as file:
            hashing = _HashingWriter(file)
            torch.save(dict(state), hashing)
            _flush(file)
        files = {_STATE: {"bytes": hashing.size, "sha256": hashing.digest.hexdigest()}}
        manifest = {"format": _FORMAT, "step": step, "files": files, **metadata}
        with open(temporary / _MANIFEST, "w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            _flush(file)
        _flush_folder(temporary)
        if final.exists():  # a damaged one: a whole one would have been continued from
            final.rename(folder / f".tmp-damaged-{final.name}")
        temporary.rename(final)
        _flush_folder(folder)
        _remove_unfinished(folder)
        for old in _paths(folder)[keep:]:
            shutil.rmtree(old)
    except (OSError, RuntimeError) as error:  # torch.save turns a failed write into RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        reason = _write_failure(error)
        if reason is None:
            raise
        raise UserError(
            f"cannot write checkpoint {final}: {reason}; older checkpoints are untouched: make "
            "room and start again with the same --workdir"
        ) from error
    return final


def newest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint, or None if there is no checkpoint at all.

    Args:
        folder: as given to `save`.
        warn: called with one line for each damaged checkpoint passed over.

    Raises:
        UserError: there are checkpoints and every one is damaged.
    """
    paths = _paths(folder)
    for path in paths:
        try:
            return _verified(path)
        except DamagedError as error:
            warn(f"checkpoint {path} is damaged ({error}): going back to the one before")
    if paths:
        raise UserError(
            f"every checkpoint in {folder} is damaged: restore one, or choose another --workdir "
            "to start over"
        )
    return None


def _verified(path: Path) -> Checkpoint:
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] > _FORMAT:
            raise UserError(
                f"checkpoint {path} has format {manifest['format']}, this version reads up to "
                f"{_FORMAT}: use the version that wrote it"
            )
        if path.name != f"{_PREFIX}{manifest['step']:08d}":
            raise DamagedError(f"{_MANIFEST} is of step {manifest['step']}")
        for name, expected in manifest["files"].items():
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                raise DamagedError(f"{name} has {size} bytes instead of {expected['bytes']}")
            with open(path / name, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != expected["sha256"]:
                raise DamagedError(f"{name} has another checksum than was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{type(error).__name__}: {error}") from error
    return Checkpoint(path, manifest)


def _paths(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    names = folder.iterdir() if folder.is_dir() else []
    steps = (p for p in names if p.name.startswith(_PREFIX) and p.name[len(_PREFIX) :].isdigit())
    return sorted(steps, key=lambda p: int(p.name[len(_PREFIX) :]), reverse=True)


def _remove_unfinished(folder: Path) -> None:
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path)


class _HashingWriter:
    """A binary file that computes the checksum of what it is given, whatever the disk keeps."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _flush(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_failure(error: BaseException) -> str | None:
    """The operating system's reason behind `error`, or None if it is not about writing."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
        cause = cause.__cause__ or cause.__context__
    return None
