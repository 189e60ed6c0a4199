"""The processes of a run: who they are, where they compute, and the few collectives they need.

torch.distributed is the engine. A run of one process needs no process group and starts none, so the
collectives here are plain identities for it.
"""

import dataclasses
import datetime
import os
import socket
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from flashtrain import environment
from flashtrain.environment import is_worker
from flashtrain.errors import UserError

__all__ = ["World", "available_cores", "is_worker", "resolve_device", "start", "stop"]

# For the others of a run to come, where no torchrun has already waited for them: variables that an
# earlier run has left promise processes that never will.
_RENDEZVOUS_TIMEOUT = datetime.timedelta(minutes=2)

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

    def least(self, value: int) -> int:
        """The smallest of all ranks' values, on every rank."""
        if self.size == 1:
            return value
        box = torch.tensor(value)
        dist.all_reduce(box, dist.ReduceOp.MIN)  # on the CPU
        return int(box)

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
    rank, size, local_rank, local_size = environment.ranks() or (0, 1, 0, 1)
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
        _join(device)
    return World(rank, size, local_rank, local_size, device)


def _join(device: torch.device) -> None:
    """Joins the other processes. Raises UserError where that is not possible."""
    _check_interfaces()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    device_id = device if device.type == "cuda" else None
    started_together = "TORCHELASTIC_RUN_ID" in os.environ
    timeout = dist.constants.default_pg_timeout if started_together else _RENDEZVOUS_TIMEOUT
    try:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        store.set_timeout(dist.constants.default_pg_timeout)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, device_id=device_id
        )
    except RuntimeError as error:
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        shown = ", ".join(f"{name}={os.environ.get(name)}" for name in names)
        raise UserError(
            f"the processes of the run do not find each other ({shown}): "
            f"{str(error).splitlines()[0]}; start all of them through a launcher, or unset these "
            "variables if an earlier run has left them"
        ) from error


def _check_interfaces() -> None:
    """Raises UserError where gloo is to use a network interface that this machine lacks."""
    key = "GLOO_SOCKET_IFNAME"
    wanted = [name for name in os.environ.get(key, "").split(",") if name]
    there = [name for _, name in socket.if_nameindex()]
    for name in wanted:
        if name not in there:
            raise UserError(
                f"{key}={os.environ[key]}, but this machine has no network interface {name}, only "
                f"{', '.join(there)}; correct the variable, or unset it"
            )


def stop() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
