"""One process per device, started by the program itself, and one error message for all of them.

On one node the program starts itself again, once per device, through torch.distributed's elastic
launcher. A process that torchrun started finds WORLD_SIZE in its environment and does not launch.

A failed rank takes the others down. What it has to say goes to the launcher through the error file
that torch.distributed.elastic gives each worker, and the launcher prints the first cause only.

A signal to the launcher is handed on to the ranks, which save and leave; the launcher waits for
them, as long as that takes. A launcher that is killed takes its ranks with it.
"""

import contextlib
import ctypes
import io
import json
import os
import signal
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flashtrain.errors import RunInterruptedError, UserError
from flashtrain.train.console import say

# Set in the processes that `launch` starts: its process id, a space, and the folder of its files.
_LAUNCHED = "FLASHTRAIN_LAUNCHED"
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
_STOP_FILE = "stop"  # in that folder once the launcher was asked to stop
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_SIGNALS = (signal.SIGTERM, signal.SIGINT)  # that ask a program to stop
_INTERRUPTED = "interrupted before training began"


def processes_to_start(device: str, devices: int) -> int:
    """How many processes this one must launch; 1: none, it can do the work itself.

    Args:
        device: trainer.device.
        devices: trainer.devices; 0 stands for every visible GPU, or one process on the CPU.

    Raises:
        UserError: there are fewer GPUs than asked for.
    """
    import torch

    from flashtrain import distributed

    if distributed.is_worker():
        return 1
    if distributed.resolve_device(device) == "cpu":
        return devices or 1
    visible = torch.cuda.device_count()
    if devices > visible:
        raise UserError(
            f"trainer.devices={devices} but torch sees {visible} GPUs; use at most {visible}, or "
            "--config.trainer.device=cpu"
        )
    return devices or visible


def launch(processes: int, argv: Sequence[str]) -> int:
    """Runs `argv` in that many processes of this Python; returns the exit code for this one.

    SIGTERM and SIGINT are handed on to them, and do nothing else from then on.
    """
    import logging

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # One node: gloo stays on the loopback interface, whatever the host name resolves to.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory(prefix="flashtrain-launch-") as log_dir:
        signals = _hand_on_signals(Path(log_dir))
        os.environ[_LAUNCHED] = f"{os.getpid()} {log_dir}"
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=log_dir),
            # None: it would kill ranks that have not saved after 30 seconds, and raise wherever the
            # launcher happens to be.
            signals_to_handle="",
        )
        try:
            elastic_launch(config, sys.executable)(*argv)
        except ChildFailedError as error:
            return _report_first_cause(error.failures, Path(log_dir), signals)
        finally:
            del os.environ[_LAUNCHED]
    return 0


def run_main(main: Callable[[], int | None]) -> int:
    """Runs a program's main; returns its exit code, printing errors as flashtrain.errors says.

    SIGTERM and SIGINT are ignored when it returns: they shall not change what the run has said and
    left, and Python takes a good part of a second to end after torch.
    """
    launched = _LAUNCHED in os.environ and _ERROR_FILE in os.environ
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is; models write anything
    try:
        if launched:
            _follow_launcher(*os.environ[_LAUNCHED].split(" ", 1))
        text, code = "", main() or 0
    except KeyboardInterrupt:
        text, code = _INTERRUPTED, 128 + signal.SIGINT
    except RunInterruptedError as error:
        text, code = "", error.exit_code  # the run has said what it saved
    except UserError as error:
        text, code = f"error: {' '.join(str(error).split())}", error.exit_code
    except Exception:  # a defect: its traceback is the message
        text, code = traceback.format_exc().rstrip(), 1
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if not code:
        return 0
    rank = os.environ.get("RANK")
    if launched:
        _write_error_file(text, code)
    elif text:
        say(text if rank is None else f"[rank {rank}] {text}")
    if rank is not None:
        # Without the teardown of a process group whose other members may be gone: its threads have
        # been seen to abort the process with a message of their own.
        sys.stdout.flush()
        os._exit(code)
    return code


def _hand_on_signals(folder: Path) -> list[int]:
    """Signals go to the ranks, however often they come; gives a list of those that have come."""
    came: list[int] = []

    def hand_on(number: int, frame: Any) -> None:
        came.append(number)
        with contextlib.suppress(OSError):
            (folder / _STOP_FILE).touch()  # for ranks that have not come to their main function
        for rank in _children():
            with contextlib.suppress(OSError):
                os.kill(rank, signal.SIGTERM)

    for number in _SIGNALS:
        signal.signal(number, hand_on)
    return came


def _children() -> list[int]:
    """Process ids of this process's children. None of them is reused before it is waited for."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it ended meanwhile
            # <process id> (<name, in which anything may stand>) <state> <parent> ...
            stat = Path("/proc", name, "stat").read_bytes()
            if int(stat.rpartition(b")")[2].split()[1]) == os.getpid():
                found.append(int(name))
    return found


def _follow_launcher(launcher: str, folder: str) -> None:
    """In a rank, before all else: it ends when the launcher does."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # that has ended already
        os._exit(1)
    if Path(folder, _STOP_FILE).exists():
        signal.raise_signal(signal.SIGTERM)  # which may have come before there was a process


def _write_error_file(text: str, code: int) -> None:
    now = time.time()
    content = {
        # What torch.distributed.elastic reads, and beside it what we do.
        "message": {"message": text, "extraInfo": {"py_callstack": text, "timestamp": int(now)}},
        "time": now,
        "exit_code": code,
    }
    path = Path(os.environ[_ERROR_FILE])
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(path)


def _report_first_cause(
    failures: dict[int, Any], log_dir: Path, signals: Sequence[int] = ()
) -> int:
    """Prints why the run failed, which one rank knows; returns the exit code that belongs to it.

    Args:
        failures: the ranks that torch.distributed.elastic saw failing, each with its `exitcode`, in
            the order in which it saw them.
        log_dir: holds the error files, `.../<local rank>/error.json`, also of ranks it did not see.
        signals: those that the launcher has handed on to the ranks.
    """
    # A rank that was killed or has a user's error is what the other ranks have stumbled over. One
    # that SIGTERM has ended did not yet train, and was stopped by the launcher: because that was
    # asked to, or for what another rank had to say.
    silent, user_error, defect, stopped = range(4)
    causes: list[tuple[int, float, str, int]] = []
    spoken = set()
    for path in log_dir.rglob("error.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        rank, code, text = (
            int(path.parent.name),
            content["exit_code"],
            content["message"]["message"],
        )
        spoken.add(rank)
        if code == 1:
            causes.append((defect, content["time"], f"rank {rank} failed:\n{text}", code))
        else:
            causes.append((user_error, content["time"], text, code))
    for order, (rank, failure) in enumerate(failures.items()):
        if rank in spoken:
            continue
        if failure.exitcode == -signal.SIGTERM and signals:
            causes.append((user_error, 0.0, _INTERRUPTED, 128 + signals[0]))
        else:
            kind = stopped if failure.exitcode == -signal.SIGTERM else silent
            causes.append((kind, order, _silent_death(rank, failure.exitcode), 1))
    *_, text, code = min(causes)
    if text:
        say(text)
    return code


def _silent_death(rank: int, exit_code: int) -> str:
    if exit_code >= 0:
        return f"error: rank {rank} ended with exit code {exit_code}"
    hint = "; the machine may be out of memory" if -exit_code == signal.SIGKILL else ""
    return f"error: rank {rank} was killed by {signal.Signals(-exit_code).name}{hint}"
