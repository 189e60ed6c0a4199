"""Environments that are hostile to any program."""

import os
import resource
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Environment(NamedTuple):
    """What is hostile about an environment."""

    variables: Mapping[str, str | None] = types.MappingProxyType({})  # None: not set
    setup: Callable[[], Any] = lambda: None
    closed: Sequence[int] = ()
    encoding: str = "utf-8"


def _limit(what: int, amount: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(what, (amount, amount))


def _gone() -> None:
    here = os.getcwd()
    os.chdir("/")
    os.makedirs(f"{here}/gone")
    os.chdir(f"{here}/gone")
    os.rmdir(f"{here}/gone")


def _redirect(number: int, path: str) -> Callable[[], None]:
    def redirect() -> None:
        file = os.open(path, os.O_WRONLY)
        os.dup2(file, number)
        os.close(file)

    return redirect


def _broken_pipe(number: int) -> Callable[[], None]:
    def redirect() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, number)
        os.close(writer)

    return redirect


def _deep(variable: str) -> Callable[[], None]:
    def make() -> None:
        path = os.path.join(os.getcwd(), *["deep" * 10] * 5)
        os.makedirs(path)
        os.environ[variable] = path

    return make


LEFTOVERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
COMPLETE = dict(zip(LEFTOVERS, ("0", "1", "0", "127.0.0.1", "29731"), strict=True))

ENVIRONMENTS: dict[str, Environment] = {
    "world size": Environment({"WORLD_SIZE": "2"}),
    "world size and rank": Environment({"WORLD_SIZE": "2", "RANK": "0"}),
    "no ranks' numbers": Environment(dict.fromkeys(LEFTOVERS, "x")),
    "empty variables": Environment(
        dict.fromkeys((*LEFTOVERS, "OMP_NUM_THREADS", "BUILD_WORKING_DIRECTORY", "DATA_DIR"), "")
    ),
    "rank alone": Environment({"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "nowhere"}),
    "rank of one": Environment(COMPLETE),
    "rank beyond the world": Environment(COMPLETE | {"RANK": "7"}),
    "slurm": Environment({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3", "SLURM_JOB_ID": "1"}),
    "launched": Environment({"FLASHTRAIN_LAUNCHED": "nonsense"}),
    "threads": Environment({"OMP_NUM_THREADS": "many"}),
    "no threads": Environment({"OMP_NUM_THREADS": "0"}),
    "devices": Environment({"CUDA_VISIBLE_DEVICES": "first"}),
    "no home": Environment({"HOME": None, "USER": None, "MPLCONFIGDIR": None}),
    "home not there": Environment({"HOME": "/proc/nowhere", "MPLCONFIGDIR": None}),
    "ascii": Environment({"LANG": "C"}, encoding="ascii"),
    "no temporary folder": Environment({"TMPDIR": "/proc/nowhere"}),
    "deep temporary folder": Environment(setup=_deep("TMPDIR")),
    "no user folder": Environment({"BUILD_WORKING_DIRECTORY": "/nowhere"}),
    "data folder is a file": Environment({"DATA_DIR": "/dev/null"}),
    "current folder deleted": Environment(setup=_gone),
    "all streams closed": Environment(closed=(0, 1)),
    "stdout is a broken pipe": Environment(setup=_broken_pipe(1)),
    "stdout is full": Environment(setup=_redirect(1, "/dev/full")),
    "few files": Environment(setup=_limit(resource.RLIMIT_NOFILE, 24)),
    "small files": Environment(setup=_limit(resource.RLIMIT_FSIZE, 1000)),
}
