"""Checkpoints that are whole or absent, and that any number of ranks can read.

A checkpoint is a folder `step_<number>` with

    rank_<number>.safetensors   tensors that one rank held
    manifest.json               format, step, size and SHA-256 of each file, the row of its
                                parameter where a piece begins (`first_rows`), config, versions,
                                data, and all state that is no tensor; its own SHA-256 over the rest

Tensors are called `model.<parameter>`, `optimizer.<parameter>.<exp_avg, exp_avg_sq, step>` and
`ema.<parameter>`. saver.py writes them: beside their final place, fsynced, renamed, so a process
killed at any moment leaves the whole checkpoint or a `.tmp-step_*` folder. A file that was cut or
altered later no longer has its checksum, and `newest` skips the checkpoint.

In a run's folder, only names `step_<number>` count, and only with that step in them; users may put
other files there. A single checkpoint, given by its path, may have any name or be a link.

Every rank writes the tensors that it holds (of those that all hold, an equal part), so no rank
needs memory for the state of the others. A rank reads the rows that it needs from the files that
have them. torch.distributed.checkpoint does that too, but its index is a pickle, which runs code
when it is loaded, and its safetensors storage has tensors only, without checksums or a commit.
safetensors and JSON cannot run code and are read without torch.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashtrain import files
from flashtrain.errors import UserError
from flashtrain.models.wrapping import unwrap, whole_parameters
from flashtrain.train import manifest as manifests
from flashtrain.train.manifest import DamagedError

_STEP = re.compile("step_([0-9]+)")
_UNFINISHED = re.compile("[.]tmp-(old-|damaged-)?step_[0-9]{8,}")  # names that saver.py makes
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


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
        """The saved state of the run, except tensors."""
        return self.section("state")

    def section(self, name: str) -> dict[str, Any]:
        """A part of the manifest. Raises UserError where the checkpoint has no such part."""
        found = self.manifest.get(name)
        if not isinstance(found, dict):
            raise self.unusable(f"its {manifests.NAME} has no section {name!r}")
        return found

    def unusable(self, reason: str) -> UserError:
        """The error of a checkpoint that is whole, but is not one that a run writes."""
        return UserError(
            f"checkpoint {self.path} was not written by this program ({reason}); choose another one"
        )


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
            except OSError as error:
                raise UserError(
                    f"cannot read {checkpoint.path / name}: {files.cause(error)}"
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
        for key, pieces in self._pieces.items():
            pieces.sort(key=lambda piece: (piece.first_row or 0, piece.shape))
            if not _fit_together(pieces):
                raise checkpoint.unusable(f"the rows of {key!r} do not fit together")

    def names(self, prefix: str) -> list[str]:
        """Names of the tensors that begin with `prefix`."""
        return [name for name in self._pieces if name.startswith(prefix)]

    def shape(self, name: str) -> torch.Size:
        """Of the whole tensor."""
        last = self._pieces[name][-1]
        if last.first_row is None:
            return last.shape
        return torch.Size((last.end_row, *last.shape[1:]))

    def is_float(self, name: str) -> bool:
        return all(piece.slice.get_dtype() in _FLOATS for piece in self._pieces[name])

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


def _fit_together(pieces: list[_Piece]) -> bool:
    """Whether sorted pieces are one whole tensor, or all of its rows, each once."""
    if any(piece.first_row is None for piece in pieces):
        return len(pieces) == 1 or not any(piece.shape for piece in pieces)  # each rank's count
    ends = [0, *(piece.end_row for piece in pieces if piece.shape)]
    return (
        len(ends) == len(pieces) + 1
        and all(piece.first_row == end for piece, end in zip(pieces, ends, strict=False))
        and all(a.shape[1:] == b.shape[1:] for a, b in itertools.pairwise(pieces))
    )


def read(path: Path) -> Checkpoint:
    """The checkpoint in a folder of any name, its files verified.

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
        folder: holds the checkpoints of one run, which may still be running and remove old ones.
        warn: called with one line for each damaged checkpoint that is skipped.

    Raises:
        UserError: there are checkpoints and every one is damaged.
    """
    damaged: set[Path] = set()
    while found := [path for path in paths(folder) if path not in damaged]:
        try:
            return _verified(found[0], _step_of(found[0]))
        except DamagedError as error:
            if os.path.lexists(found[0]):
                damaged.add(found[0])
                warn(f"checkpoint {found[0]} is damaged ({error}): going back to the one before")
    if damaged:
        raise UserError(
            f"every checkpoint in {folder} is damaged or has another step's name: restore one, or "
            "choose another --workdir to start over"
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
    parameters = whole_parameters(unwrap(model, nn.Module))
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
        elif not reader.is_float(prefix + name):
            mismatch = f"{name!r} holds no floating-point numbers"
        else:
            continue
        raise _other_model(checkpoint, mismatch)
    for name in reader.names("optimizer."):
        parameter = name.removeprefix("optimizer.").rpartition(".")[0]
        shape = reader.shape(name)
        if shape and shape != shapes.get(parameter):  # step counts are scalars
            raise _other_model(checkpoint, f"{name!r} has shape {tuple(shape)}")
        if not reader.is_float(name):
            raise _other_model(checkpoint, f"{name!r} holds no floating-point numbers")


def _other_model(checkpoint: Checkpoint, mismatch: str) -> UserError:
    return UserError(
        f"the checkpoint {checkpoint.path} is of another model: {mismatch}; choose another "
        "--workdir"
    )


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def paths(folder: Path) -> list[Path]:
    """All paths named `step_<number>`, whole or damaged, the largest number first.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        names = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"cannot read {folder}: {files.cause(error)}") from error
    steps = (path for path in names if _STEP.fullmatch(path.name))
    return sorted(steps, key=lambda path: (_step_of(path), path.name), reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def set_aside(path: Path) -> Path:
    """Renames the path in the place of a checkpoint to a free name beside it; returns that."""
    for number in itertools.count(1):
        aside = path.with_name(f"{path.name}.damaged{f'-{number}' if number > 1 else ''}")
        if not os.path.lexists(aside):
            return path.rename(aside)
    raise AssertionError("there is always a free name")


def remove_unfinished(folder: Path) -> None:
    """Removes the unfinished saves of killed processes, and nothing else."""
    for path in folder.glob(".tmp-*"):
        if _UNFINISHED.fullmatch(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                set_aside(path)  # a save makes a folder of this name


def prune(folder: Path, *, step: int, newest: int, best: int, every: int) -> None:
    """Removes all checkpoints but some. Paths that no save has written stay, and do not count.

    Args:
        step: of the checkpoint just written. Later ones were damaged when the run began: they stay
            until the run comes there, and do not count.
        newest: how many of the newest stay.
        best: how many of those with the lowest validation loss stay, if it was measured there.
        every: those whose step is a multiple of it stay; 0: none for that.

    Raises:
        OSError: one could not be removed.
    """
    found = [whole for path in paths(folder) if (whole := _written(path)) and whole.step <= step]
    losses = {c.step: loss for c in found if (loss := _validation_loss(c)) is not None}
    kept = {*[c.step for c in found[:newest]], *sorted(losses, key=lambda s: losses[s])[:best]}
    for old in found:
        if old.step in kept or (every and old.step % every == 0):
            continue
        with contextlib.suppress(FileNotFoundError):  # a user has moved it elsewhere
            if _is_only_ours(old):
                # Renamed first: the rest of an interrupted removal is no checkpoint.
                shutil.rmtree(old.path.rename(folder / f".tmp-old-{old.path.name}"))


def _written(path: Path) -> Checkpoint | None:
    """A checkpoint as a run writes it, whole as far as its manifest and sizes say; or None."""
    try:
        found = manifests.read(path)
        manifests.check_sizes(path, found)
    except (DamagedError, UserError):
        return None
    as_written = path == path_of(path.parent, found["step"]) and not path.is_symlink()
    return Checkpoint(path, found) if as_written else None


def _is_only_ours(found: Checkpoint) -> bool:
    """Whether a checkpoint's folder holds nothing that a user has put there."""
    written = {manifests.NAME, f".tmp-{manifests.NAME}", *found.manifest["files"]}
    return written.issuperset(os.listdir(found.path))


def _validation_loss(found: Checkpoint) -> float | None:
    """Measured after the step of the checkpoint; None if it was not, or was no number."""
    try:
        progress = found.manifest["state"]["progress"]
        loss = progress["metrics"]["loss"]
        if progress["val_step"] == progress["step"] and math.isfinite(loss):
            return loss
    except (KeyError, TypeError):
        pass
    return None


def _verified(path: Path, step: int | None = None) -> Checkpoint:
    """The whole checkpoint in a folder, which must be of `step` where that is given."""
    found = manifests.read(path)
    if step is not None and found["step"] != step:
        raise DamagedError(f"{manifests.NAME} is of step {found['step']}")
    manifests.check_files(path, found)
    return Checkpoint(path, found)
