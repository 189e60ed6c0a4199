"""Writes checkpoints while training goes on.

`save` copies a rank's tensors to host memory, in the order of the device's work, and returns; a
thread writes the copy. Each rank writes its own file into `.tmp-step_<number>` and then, in one
piece, what that file is (`rank_<number>.json`); when all ranks have, rank 0 writes the manifest and
renames the folder. The ranks meet in the file system, so no collective runs beside training's, and
the run's folder must be one that all of them see.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from flashtrain.distributed import World
from flashtrain.errors import UserError
from flashtrain.train import checkpoint, tensor_file
from flashtrain.train.config import TrainerConfig

_POLL_SECONDS = 0.01


@dataclasses.dataclass(frozen=True)
class Held:
    """A tensor that this rank saves: all of it, or the rows from `first_row` on."""

    tensor: Tensor
    first_row: int | None = None


class Saver:
    """Saves the checkpoints of a run from one rank, one at a time."""

    def __init__(self, folder: Path, world: World, trainer: TrainerConfig):
        self._folder = folder
        self._world = world
        self._trainer = trainer
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._pinned: dict[str, Tensor] = {}

    def save(self, step: int, tensors: Mapping[str, Held], manifest: Mapping[str, Any]) -> None:
        """Begins to save what the tensors hold now.

        Args:
            step: optimizer steps done.
            tensors: by name; every rank another part.
            manifest: its keys besides format, step, files and checksum; of rank 0.

        Raises:
            UserError: the save before this one failed.
        """
        self.wait()
        copies, copied = self._copy(tensors)
        first_rows = {n: h.first_row for n, h in tensors.items() if h.first_row is not None}

        def work() -> None:
            try:
                if copied is not None:
                    copied.synchronize()
                self._write(step, copies, first_rows, manifest)
            except BaseException as error:
                self._error = error  # raised by the next call of this object

        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises UserError if the save that went on in the background has failed."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Returns when what was saved is on the disk; on rank 0, when the checkpoint is whole."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _copy(
        self, tensors: Mapping[str, Held]
    ) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        """Copies on the host, and the event after which those from a GPU are complete."""
        copies = {}
        for name, held in tensors.items():
            tensor = held.tensor.detach()
            if not tensor.is_cuda:
                copies[name] = tensor.clone(memory_format=torch.contiguous_format)
                continue
            if name not in self._pinned or self._pinned[name].shape != tensor.shape:
                self._pinned[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            copies[name] = self._pinned[name].copy_(tensor, non_blocking=True)
        if self._world.device.type != "cuda":
            return copies, None
        copied = torch.cuda.Event()
        copied.record()
        return copies, copied

    def _write(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        first_rows: Mapping[str, int],
        manifest: Mapping[str, Any],
    ) -> None:
        final = checkpoint.path_of(self._folder, step)
        temporary = self._folder / f".tmp-{final.name}"
        name = f"rank_{self._world.rank:05d}"
        alone = self._world.size == 1  # in the folder, now
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            with open(temporary / f"{name}.safetensors", "wb") as file:
                entry = tensor_file.write(file, tensors)
                _flush(file)
            _write_json(temporary / f"{name}.json", {**entry, "first_rows": dict(first_rows)})
            if self._world.is_main:
                files = self._gather(temporary)
                alone = True
                self._commit(temporary, final, {"step": step, "files": files, **manifest})
        except OSError as error:
            if alone:
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                # Without the folder the others would fail too, and one of them might be the first
                # to say why: no such file. The next start removes it.
                with contextlib.suppress(OSError):
                    (temporary / f"{name}.safetensors").unlink()
            raise UserError(
                f"cannot write checkpoint {final}: {error.strerror or error}; older checkpoints "
                "are untouched: make room and start again with the same --workdir"
            ) from error

    def _gather(self, temporary: Path) -> dict[str, Any]:
        """Waits for every rank's file; what each is, by name. A rank that fails ends the run."""
        files = {}
        for rank in range(self._world.size):
            path = temporary / f"rank_{rank:05d}.json"
            while not path.exists():
                time.sleep(_POLL_SECONDS)
            files[f"{path.stem}.safetensors"] = json.loads(path.read_text(encoding="utf-8"))
            path.unlink()
        return files

    def _commit(self, temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
        manifest = {"format": checkpoint.FORMAT, **manifest}
        manifest["sha256"] = checkpoint.manifest_checksum(manifest)
        _write_json(temporary / checkpoint.MANIFEST, manifest)
        _flush_folder(temporary)
        if final.exists():  # a damaged one: a whole one would have been continued from
            shutil.rmtree(final.rename(self._folder / f".tmp-damaged-{final.name}"))
        temporary.rename(final)
        _flush_folder(self._folder)
        checkpoint.prune(
            self._folder,
            step=manifest["step"],
            newest=self._trainer.keep_checkpoints,
            best=self._trainer.keep_best,
            every=self._trainer.keep_every,
        )


def _write_json(path: Path, content: Any) -> None:
    """Writes a file that is whole or not there."""
    temporary = path.with_name(f".{path.name}")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file)
        _flush(file)
    temporary.replace(path)


def _flush(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
