"""Checkpoints that are whole or not there, and can be read by any number of ranks.

A checkpoint is a folder `step_<number>` with

    rank_<number>.safetensors   tensors that one rank held
    manifest.json               format, step, size and SHA-256 of each file, where in its parameter
                                a piece begins (`first_rows`), config, versions, data, and all state
                                that is no tensor; its own SHA-256 over the rest

Tensors are called `model.<parameter>`, `optimizer.<parameter>.<exp_avg, exp_avg_sq, step>` and
`ema.<parameter>`. saver.py writes them: beside their final place, fsynced, renamed, so a process
killed at any moment leaves the whole checkpoint or a `.tmp-*` folder. A file that was cut or
altered later no longer has its checksum, and `newest` passes over the checkpoint.

Every rank writes what it holds (an equal part of what all hold), so that no rank needs memory for
the state of the others; reading, a rank takes the rows it wants out of whichever files have them.
torch.distributed.checkpoint does that too, but its index is a pickle, which runs code when it is
loaded, and its safetensors storage knows tensors only, without checksums or a commit; safetensors
and JSON cannot run code and are read without torch.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashtrain.errors import UserError
from flashtrain.train import tensor_file

FORMAT = 2
MANIFEST = "manifest.json"
_PREFIX = "step_"
_VERIFY_THREADS = 8


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

    @property
    def state(self) -> dict[str, Any]:
        """What the run saved besides tensors."""
        return self.manifest["state"]


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Some rows of a tensor in an open file."""

    slice: Any
    first_row: int | None  # None: the tensor is whole
    shape: torch.Size

    @property
    def end_row(self) -> int:
        return (self.first_row or 0) + self.shape[0]


class Reader:
    """The tensors of a checkpoint, read when they are asked for. Runs no code from the files.

    Raises:
        UserError: a file is not of the format, so it was not written by this program, or is gone.
    """

    def __init__(self, checkpoint: Checkpoint):
        import safetensors  # not needed by a run that starts from nothing

        self._path = checkpoint.path
        self._pieces: dict[str, list[_Piece]] = {}
        for name, entry in checkpoint.manifest["files"].items():
            try:
                file = safetensors.safe_open(checkpoint.path / name, framework="pt")
            except FileNotFoundError as error:
                raise UserError(
                    f"checkpoint {checkpoint.path} was removed just now, as a run does with its "
                    "old ones; start again to take a newer one"
                ) from error
            except safetensors.SafetensorError as error:
                raise UserError(
                    f"checkpoint file {checkpoint.path / name} is no safetensors file ({error}); "
                    "it is not loaded: choose another --workdir"
                ) from error
            for key in file.keys():  # noqa: SIM118  # it is no mapping
                part = file.get_slice(key)
                first_row = entry.get("first_rows", {}).get(key)
                piece = _Piece(part, first_row, torch.Size(part.get_shape()))
                self._pieces.setdefault(key, []).append(piece)
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece.first_row or 0)

    def names(self, prefix: str) -> list[str]:
        """Names of the tensors that begin with `prefix`."""
        return [name for name in self._pieces if name.startswith(prefix)]

    def shape(self, name: str) -> torch.Size:
        """Of the whole tensor."""
        last = self._pieces[name][-1]
        if last.first_row is None:
            return last.shape
        return torch.Size((last.end_row, *last.shape[1:]))

    def read(self, name: str, first_row: int | None = None, rows: int = 0) -> Tensor:
        """The tensor on the CPU; with `first_row` only that many `rows` from there on."""
        if not self.shape(name):
            return self._pieces[name][0].slice[...]
        if first_row is None:
            first_row, rows = 0, self.shape(name)[0]
        parts: list[Tensor] = []
        for piece in self._pieces[name]:
            base = piece.first_row or 0
            start, end = max(first_row, base), min(first_row + rows, piece.end_row)
            if start < end or (start == end and not parts):
                parts.append(piece.slice[start - base : end - base])
        found = parts[0] if len(parts) == 1 else torch.cat(parts)
        if len(found) != rows:
            raise UserError(
                f"checkpoint {self._path} lacks rows of {name!r}; choose another --workdir"
            )
        return found


def read(path: Path) -> Checkpoint:
    """The checkpoint in a folder `step_<number>`, its files verified.

    Raises:
        UserError: it is missing, damaged, or of another format.
    """
    try:
        return _verified(path)
    except DamagedError as error:
        raise UserError(f"checkpoint {path} is missing or damaged ({error})") from error


def newest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint, or None if there is no checkpoint at all.

    Args:
        folder: holds the checkpoints of one run, which may be going on and remove old ones.
        warn: called with one line for each damaged checkpoint passed over.

    Raises:
        UserError: there are checkpoints and every one is damaged.
    """
    damaged: set[Path] = set()
    while found := [path for path in paths(folder) if path not in damaged]:
        try:
            return _verified(found[0])
        except DamagedError as error:
            if os.path.lexists(found[0]):
                damaged.add(found[0])
                warn(f"checkpoint {found[0]} is damaged ({error}): going back to the one before")
    if damaged:
        raise UserError(
            f"every checkpoint in {folder} is damaged: restore one, or choose another --workdir "
            "to start over"
        )
    return None


@torch.no_grad()
def load_weights(checkpoint: Checkpoint, model: nn.Module, *, ema: bool = False) -> None:
    """Copies the saved weights, or their moving average, into a model of one process.

    Raises:
        UserError: they are another model's; nothing has been changed then.
    """
    reader = Reader(checkpoint)
    prefix = "ema." if ema else "model."
    parameters = dict(model.named_parameters())
    check_fits(checkpoint, reader, {n: p.shape for n, p in parameters.items()}, prefix)
    for name, parameter in parameters.items():
        parameter.copy_(reader.read(prefix + name))


def check_fits(
    checkpoint: Checkpoint,
    reader: Reader,
    shapes: Mapping[str, torch.Size],
    prefix: str = "model.",
) -> None:
    """Raises UserError where the saved tensors differ from a model's in a name or shape.

    Args:
        shapes: of the model's parameters, by name.
        prefix: of the saved tensors to compare; those of the optimizer must fit in any case.
    """
    saved = {name.removeprefix(prefix): reader.shape(name) for name in reader.names(prefix)}
    for name in sorted(saved.keys() | shapes.keys()):
        if name not in shapes:
            mismatch = f"it has a tensor {name!r} that the model does not have"
        elif name not in saved:
            mismatch = f"it lacks the model's tensor {name!r}"
        elif saved[name] != shapes[name]:
            mismatch = (
                f"{name!r} has shape {tuple(saved[name])}, in the model {tuple(shapes[name])}"
            )
        else:
            continue
        raise _other_model(checkpoint, mismatch)
    for name in reader.names("optimizer."):
        parameter = name.removeprefix("optimizer.").rpartition(".")[0]
        shape = reader.shape(name)
        if shape and shape != shapes.get(parameter):  # step counts are scalars
            raise _other_model(checkpoint, f"{name!r} has shape {tuple(shape)}")


def _other_model(checkpoint: Checkpoint, mismatch: str) -> UserError:
    return UserError(
        f"the checkpoint {checkpoint.path} is of another model: {mismatch}; choose another "
        "--workdir"
    )


def path_of(folder: Path, step: int) -> Path:
    return folder / f"{_PREFIX}{step:08d}"


def paths(folder: Path) -> list[Path]:
    """Checkpoint folders, whole or damaged, newest first."""
    names = folder.iterdir() if folder.is_dir() else []
    steps = (p for p in names if p.name.startswith(_PREFIX) and p.name[len(_PREFIX) :].isdigit())
    return sorted(steps, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix(_PREFIX))


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes have left of saves."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path)


def prune(folder: Path, *, step: int, newest: int, best: int, every: int) -> None:
    """Removes all checkpoints but some.

    Args:
        step: of the checkpoint just written. Later ones were damaged when the run began: they stay
            until the run comes there, and do not count.
        newest: how many of the newest stay.
        best: how many of those with the lowest validation loss stay, if it was measured there.
        every: those whose step is a multiple of it stay; 0: none for that.
    """
    found = [path for path in paths(folder) if _step_of(path) <= step]
    losses = {path: loss for path in found if (loss := _validation_loss(path)) is not None}
    kept = {*found[:newest], *sorted(losses, key=lambda path: losses[path])[:best]}
    for path in found:
        if path not in kept and not (every and _step_of(path) % every == 0):
            # Renamed first: what is left of a removal that was cut short is no checkpoint.
            doomed = path.rename(folder / f".tmp-old-{path.name}")
            shutil.rmtree(doomed)


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 over everything in a manifest but the checksum itself."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _validation_loss(path: Path) -> float | None:
    """Measured when the checkpoint was saved; None if it was not, or was no number."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        progress = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["state"]["progress"]
        loss = progress["metrics"]["loss"]
        if progress["val_step"] == progress["step"] and math.isfinite(loss):
            return loss
    return None


def _verified(path: Path) -> Checkpoint:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise UserError(
                f"checkpoint {path} has format {manifest['format']}, this version reads {FORMAT}: "
                "use the version that wrote it"
            )
        if manifest_checksum(manifest) != manifest["sha256"]:
            raise DamagedError(f"{MANIFEST} has another checksum than was written")
        if path.name != path_of(path.parent, manifest["step"]).name:
            raise DamagedError(f"{MANIFEST} is of step {manifest['step']}")
        files = manifest["files"]
        for name, expected in files.items():
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                raise DamagedError(f"{name} has {size} bytes instead of {expected['bytes']}")
        with concurrent.futures.ThreadPoolExecutor(_VERIFY_THREADS) as pool:
            digests = list(pool.map(lambda name: tensor_file.checksum(path / name), files))
        for (name, expected), digest in zip(files.items(), digests, strict=True):
            if digest != expected["sha256"]:
                raise DamagedError(f"{name} has another checksum than was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{type(error).__name__}: {error}") from error
    return Checkpoint(path, manifest)
