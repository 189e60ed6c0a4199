"""Writes checkpoints while training continues.

`save` copies a rank's tensors to host memory, in the order of the device's work, and returns; a
thread writes the copy. Each rank writes its own file into `.tmp-step_<number>` and then, in one
piece, a description of that file (`rank_<number>.json`). When all ranks have done so, rank 0 writes
the manifest and renames the folder. The ranks meet in the file system, so no collective runs beside
training's, and all ranks must see the run's folder.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashtrain import files
from flashtrain.distributed import World
from flashtrain.errors import UserError
from flashtrain.train import checkpoint, tensor_file
from flashtrain.train import manifest as manifests
from flashtrain.train.checkpoint import Checkpoint
from flashtrain.train.config import TrainerConfig
from flashtrain.train.console import say

_POLL_SECONDS = 0.01


@dataclasses.dataclass(frozen=True)
class Held:
    """A tensor that this rank saves: all of it, or the rows from `first_row` on."""

    tensor: Tensor
    first_row: int | None = None


class Saver:
    """Saves the checkpoints of a run from one rank, one at a time.

    Attributes:
        folder: where the checkpoints are.
        step: of the newest checkpoint, which is being written or was continued from, if any.
        last: the newest whole one; known to rank 0.
    """

    def __init__(self, folder: Path, world: World, trainer: TrainerConfig):
        self.folder = folder
        self._world = world
        self._trainer = trainer
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._pinned: dict[str, Tensor] = {}
        self.step: int | None = None
        self.last: Checkpoint | None = None

    def go_on_from(self, found: Checkpoint) -> None:
        """Makes a checkpoint of an earlier process the newest one."""
        self.step, self.last = found.step, found

    def last_good(self) -> str:
        """The place of the newest checkpoint, or that there is none, for an error message."""
        if self.step is None:
            return "no checkpoint was saved before"
        return f"the last good checkpoint, of step {self.step}, is kept in {self.folder}"

    def save(self, step: int, tensors: Mapping[str, Held], manifest: Mapping[str, Any]) -> None:
        """Begins to save the current content of the tensors.

        Args:
            step: optimizer steps done.
            tensors: by name; every rank another part.
            manifest: its keys except format, step, files and checksum; of rank 0.

        Raises:
            UserError: the save before this one failed.
        """
        self.wait()
        self.step = step
        copies, copied = self._copy(tensors)
        first_rows = {n: h.first_row for n, h in tensors.items() if h.first_row is not None}

        def work() -> None:
            if copied is not None:
                copied.synchronize()
            self._write(step, copies, first_rows, manifest)

        self._begin(work)

    def amend(self, state: Mapping[str, Any]) -> None:
        """Begins to add the measurements after the last save to its manifest.

        Args:
            state: parts of the manifest's section `state` to replace; of rank 0.
        """
        if self._world.is_main:
            self._begin(lambda: self._amend(state))

    def check(self) -> None:
        """Raises UserError if the save in the background has failed."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Returns when the saves are on the disk; on rank 0, when the checkpoint is whole."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _begin(self, work: Callable[[], None]) -> None:
        """Has a thread do `work` after all earlier work, unless that fails."""
        before = self._thread

        def run() -> None:
            if before is not None:
                before.join()
            if self._error is None:
                try:
                    work()
                except BaseException as error:
                    self._error = error  # raised by the next call of this object

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def _copy(
        self, tensors: Mapping[str, Held]
    ) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        """Copies on the host, and the event after which those from a GPU are complete."""
        pinned, self._pinned = self._pinned, {}  # no memory for tensors that are saved no more
        copies = {}
        for name, held in tensors.items():
            tensor = held.tensor.detach()
            if not tensor.is_cuda:
                copies[name] = tensor.clone(memory_format=torch.contiguous_format)
                continue
            buffer = pinned.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._pinned[name] = copies[name] = buffer.copy_(tensor, non_blocking=True)
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
        final = checkpoint.path_of(self.folder, step)
        temporary = self.folder / f".tmp-{final.name}"
        name = f"rank_{self._world.rank:05d}"
        alone = self._world.size == 1  # in the folder, now
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            with open(temporary / f"{name}.safetensors", "wb") as file:
                entry = tensor_file.write(file, tensors)
                files.flush(file)
            entry["first_rows"] = dict(first_rows)
            files.write(temporary / f"{name}.json", json.dumps(entry).encode())
            if not self._world.is_main:
                return
            listed = self._gather(temporary)
            alone = True
            content = {"format": manifests.FORMAT, "step": step, "files": listed, **manifest}
            self._commit(temporary, final, content)
        except OSError as error:
            if alone:
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                # Without the folder the others would fail too, and one of them might be the first
                # to say why: no such file. The next start removes it.
                with contextlib.suppress(OSError):
                    (temporary / f"{name}.safetensors").unlink()
            raise self._cannot_write(final, error) from error
        self._prune(step)

    def _gather(self, temporary: Path) -> dict[str, Any]:
        """Waits for every rank's file; returns their descriptions. A failed rank ends the run."""
        found = {}
        for rank in range(self._world.size):
            path = temporary / f"rank_{rank:05d}.json"
            while not path.exists():
                time.sleep(_POLL_SECONDS)
            found[f"{path.stem}.safetensors"] = json.loads(path.read_text(encoding="utf-8"))
            path.unlink()
        return found

    def _commit(self, temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
        manifests.write(temporary, manifest)
        files.flush_folder(temporary)
        if os.path.lexists(final):  # damaged: a whole one would have been continued from
            aside = checkpoint.set_aside(final)
            say(f"what was {final} could not be used; it is kept as {aside.name}")
        temporary.rename(final)
        files.flush_folder(self.folder)
        self.last = Checkpoint(final, manifest)

    def _amend(self, state: Mapping[str, Any]) -> None:
        last = self.last
        if last is None or last.path.is_symlink():  # to a folder that is not the run's
            return
        manifest = {**last.manifest, "state": {**last.state, **state}}
        try:
            manifests.write(last.path, manifest)
        except FileNotFoundError:
            return  # a user has moved it elsewhere
        except OSError as error:
            raise self._cannot_write(last.path, error) from error
        self.last = Checkpoint(last.path, manifest)
        self._prune(last.step)

    def _prune(self, step: int) -> None:
        keep = self._trainer
        try:
            checkpoint.prune(
                self.folder,
                step=step,
                newest=keep.keep_checkpoints,
                best=keep.keep_best,
                every=keep.keep_every,
            )
        except OSError as error:
            say(f"an old checkpoint in {self.folder} cannot be removed: {files.cause(error)}")

    def _cannot_write(self, path: Path, error: OSError) -> UserError:
        return UserError(
            f"cannot write checkpoint {path}: {files.cause(error)}; older checkpoints are "
            "untouched: start again with the same --workdir to go on"
        )
