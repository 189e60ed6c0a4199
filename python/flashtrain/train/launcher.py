"""One process per device, started by the program itself, and one error message for all of them.

On one node the program starts itself again, once per device, through torch.distributed's elastic
launcher. A process that torchrun started finds WORLD_SIZE in its environment and does not launch.

A failed rank takes the others down. What it has to say goes to the launcher through the error file
that torch.distributed.elastic gives each worker, and the launcher prints the first cause only.
"""

import ctypes
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

_LAUNCHED = "FLASHTRAIN_LAUNCHED"  # set in the processes that `launch` starts
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


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
    """Runs `argv` in that many processes of this Python; returns the exit code for this one."""
    import logging

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[_LAUNCHED] = "1"
    # One node: gloo stays on the loopback interface, whatever the host name resolves to.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory(prefix="flashtrain-launch-") as log_dir:
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
        )
        try:
            elastic_launch(config, sys.executable)(*argv)
        except ChildFailedError as error:
            return _report_first_cause(error.failures, Path(log_dir))
        except SignalException:
            return RunInterruptedError.exit_code  # the ranks have saved and said so
    return 0


def run_main(main: Callable[[], int | None]) -> int:
    """Runs a program's main; returns its exit code, printing errors as flashtrain.errors says."""
    launched = os.environ.get(_LAUNCHED) == "1" and _ERROR_FILE in os.environ
    if launched:
        # The launcher may be killed; nobody would be left to end this process.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        return main() or 0
    except KeyboardInterrupt:
        text, code = "interrupted before training began", 128 + signal.SIGINT
    except RunInterruptedError as error:
        text, code = "", error.exit_code  # the run has said what it saved
    except UserError as error:
        text, code = f"error: {' '.join(str(error).split())}", error.exit_code
    except Exception:  # a defect: its traceback is the message
        text, code = traceback.format_exc().rstrip(), 1
    rank = os.environ.get("RANK")
    if launched:
        _write_error_file(text, code)
    elif text:
        print(text if rank is None else f"[rank {rank}] {text}", file=sys.stderr, flush=True)
    if rank is not None:
        # Without the teardown of a process group whose other members may be gone: its threads have
        # been seen to abort the process with a message of their own.
        sys.stdout.flush()
        os._exit(code)
    return code


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


def _report_first_cause(failures: dict[int, Any], log_dir: Path) -> int:
    """Prints why the run failed, which one rank knows; returns the exit code that belongs to it.

    Args:
        failures: the ranks that torch.distributed.elastic saw failing, each with its `exitcode`.
        log_dir: holds the error files, `.../<local rank>/error.json`, also of ranks it did not see.
    """
    # A rank that was killed or has a user's error is what the other ranks have stumbled over; one
    # that SIGTERM has ended was stopped by the launcher, for what another rank had to say.
    silent, user_error, defect, stopped = range(4)
    causes = []
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
    for rank, failure in failures.items():
        if rank not in spoken:
            kind = stopped if failure.exitcode == -signal.SIGTERM else silent
            causes.append((kind, 0.0, _silent_death(rank, failure.exitcode), 1))
    *_, text, code = min(causes)
    if text:
        print(text, file=sys.stderr, flush=True)
    return code


def _silent_death(rank: int, exit_code: int) -> str:
    if exit_code >= 0:
        return f"error: rank {rank} ended with exit code {exit_code}"
    hint = "; the machine may be out of memory" if -exit_code == signal.SIGKILL else ""
    return f"error: rank {rank} was killed by {signal.Signals(-exit_code).name}{hint}"
