"""The processes of a run: who they are, where they compute, and the few collectives they need.

torch.distributed is the engine. A run of one process needs no process group and starts none, so the
collectives here are plain identities for it.
"""

import dataclasses
import os
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from flashtrain.errors import UserError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0 alone writes files and speaks to the user."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place; on a GPU without waiting for it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, value: T) -> T:
        """Rank 0's value of any object that pickle can hold, on every rank."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def barrier(self) -> None:
        """Waits on the host until every rank has come here."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(()))  # on the CPU, so that the host itself waits


def is_worker() -> bool:
    """Whether a launcher (ours, torchrun, SLURM through torchrun) has started this process."""
    return "WORLD_SIZE" in os.environ


def resolve_device(device: str) -> str:
    """Turns a trainer.device into "cuda" or "cpu". Raises UserError where there is no "cuda"."""
    available = torch.cuda.device_count() > 0
    if device == "cuda" and not available:
        raise UserError(
            "trainer.device is 'cuda' but torch sees no GPU; use --config.trainer.device=cpu or "
            "check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
        )
    if device == "auto":
        return "cuda" if available else "cpu"
    return device


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


def start(device_name: str) -> World:
    """Joins the run's process group, if there is one; takes this process's device and threads.

    On the CPU the processes share the cores, unless OMP_NUM_THREADS says how many threads each has
    (torchrun sets it to 1 where it is not set).
    """
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if resolve_device(device_name) == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{local_size} processes were started but torch sees {torch.cuda.device_count()} "
                "GPUs; start one process per GPU"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, available_cores() // local_size))
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        device_id = device if device.type == "cuda" else None
        dist.init_process_group(backend, device_id=device_id)
    return World(rank, size, local_rank, local_size, device)


def stop() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
