"""One process per device, started by the program itself, and one error message for all of them.

On one node the program starts itself again, once per device, through torch.distributed's elastic
launcher. A process that torchrun started finds WORLD_SIZE in its environment and does not launch.

If a rank fails, the others are stopped. Its error reaches the launcher through the error file that
torch.distributed.elastic gives each worker, and the launcher prints only the first cause.

The launcher hands a signal on to the ranks, which save and exit, and waits for them for as long as
they need. The ranks of a launcher that is killed end too.
"""

import contextlib
import ctypes
import errno
import io
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flashtrain import environment, files
from flashtrain.environment import INTERRUPTED, Interrupted, on_stop_signals
from flashtrain.errors import UserError
from flashtrain.train import console
from flashtrain.train.console import say

# Set in the processes that `launch` starts: its process id, a space, and the folder of its files.
_LAUNCHED = "FLASHTRAIN_LAUNCHED"
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
_FOLDERS = "flashtrain-launch-"  # in the temporary folder; each is locked by its launcher
_STOP_FILE = "stop"  # in such a folder once the launcher was asked to stop
_RANK_FILES = "process-"  # there, with the process id behind it: a rank that can be stopped
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def processes_to_start(device: str, devices: int) -> int:
    """The number of processes to launch; 1: none, this process can do the work itself.

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

    Signals that ask to stop are handed on to them, and have no other effect from then on.

    Raises:
        UserError: they cannot be started.
    """
    import logging

    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # One node: gloo stays on the loopback interface, whatever the host name resolves to.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    _check_loopback()
    with _folder() as log_dir:
        signals = _hand_on_signals(log_dir)
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
            logs_specs=DefaultLogsSpecs(log_dir=str(log_dir)),
            # None: it would kill ranks that have not saved after 30 seconds, and raise wherever the
            # launcher happens to be.
            signals_to_handle="",
        )
        try:
            elastic_launch(config, sys.executable)(*argv)
        except ChildFailedError as error:
            return _report_first_cause(error.failures, log_dir, signals)
        except (DistError, RendezvousError) as error:
            raise UserError(f"{processes} processes cannot be started: {error}") from error
        finally:
            del os.environ[_LAUNCHED]
    return 0


def run_main(main: Callable[[], int | None]) -> int:
    """Runs a program's main; returns its exit code, printing errors as flashtrain.errors says.

    The user's folder is the current one in it. Signals that ask to stop are ignored after it has
    returned: Python needs a good part of a second to end after torch, and a signal then must not
    change the outcome of the run.
    """
    launched = _LAUNCHED in os.environ and _ERROR_FILE in os.environ
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is; models write anything
    try:
        if launched:
            _follow_launcher(*os.environ[_LAUNCHED].split(" ", 1))
        environment.enter_user_folder()
        environment.check_threads()
        text, code = "", main() or 0
        with console.heard_or_not(sys.stdout):
            sys.stdout.flush()
    except BaseException as error:
        text, code = _explain(error)
    on_stop_signals(signal.SIG_IGN)
    console.drop_unwritten()
    if not code:
        return 0
    worker = environment.is_worker()
    if launched:
        _write_error_file(text, code)
    elif text:
        with contextlib.suppress(OSError):  # nowhere to say it
            one_of_many = worker and os.environ["WORLD_SIZE"] != "1"
            say(f"[rank {os.environ['RANK']}] {text}" if one_of_many else text)
    if worker:
        # Without the teardown of a process group whose other members may be gone: its threads have
        # been seen to abort the process with a message of their own.
        os._exit(code)
    return code


@contextlib.contextmanager
def interruptible(text: str) -> Iterator[None]:
    """Around work that cleans up before it exits: signals raise `Interrupted` in it.

    Args:
        text: of the error; says what has become of the work.
    """
    before = {number: signal.getsignal(number) for number in environment.STOP_SIGNALS}

    def interrupt(number: int, frame: Any) -> None:
        on_stop_signals(signal.SIG_IGN)
        raise Interrupted(number, text)

    on_stop_signals(interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is interrupt:  # none has come
            for number, handler in before.items():
                signal.signal(number, handler)


def _explain(error: BaseException) -> tuple[str, int]:
    """The message for an exception that has ended a program, and its exit code."""
    if isinstance(error, Interrupted):
        return error.text, 128 + error.number
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, 128 + signal.SIGINT
    if isinstance(error, SystemExit):
        code = error.code or 0
        return ("", code) if isinstance(code, int) else (str(code), 1)
    if isinstance(error, BrokenPipeError) and console.reader_has_left():
        return "", 0  # as `| head` does; there is no reader for a message
    if isinstance(error, UserError):
        reason, code = str(error), error.exit_code  # RunInterruptedError: the run has said it
    elif isinstance(error, OSError):
        reason, code = _describe(error), UserError.exit_code
    elif (shortage := _shortage(error)) is not None:
        reason, code = shortage, UserError.exit_code
    else:  # a defect; its traceback is the message
        return "".join(traceback.format_exception(error)).rstrip(), 1
    return (f"error: {' '.join(reason.split())}", code) if reason else ("", code)


def _describe(error: OSError) -> str:
    """The refused operation, and the reason."""
    reason, system = files.cause(error), os.strerror(error.errno or 0)
    if error.errno == errno.ENOENT:
        reason = "there is no such file or folder"
    if error.errno is not None and error.strerror != system:
        reason = error.strerror or reason  # of a library, and more exact than the number
    elif error.errno is not None and reason != system:
        reason += f" ({system})"
    if error.filename is None or isinstance(error.filename, int):
        return reason
    return f"{os.fsdecode(error.filename)}: {reason}"


def _shortage(error: BaseException) -> str | None:
    """The resource that the machine lacks, if the exception means that."""
    text = str(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return f"the machine is out of memory ({text.splitlines()[0] if text else 'none is left'})"
    if "can't start new thread" in text:
        return "the system allows no more threads; raise `ulimit -u`"
    return None


def _check_loopback() -> None:
    """Raises UserError where the ranks could not talk to each other."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=10).close()
    except OSError as error:
        raise UserError(
            "processes of this machine cannot connect to 127.0.0.1, through which they find each "
            f"other: {error.strerror or error}; bring the loopback interface up (ip link set lo up)"
        ) from error


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A new temporary folder of this launcher; removes those of killed ones."""
    parent = Path(tempfile.gettempdir())
    for leftover in parent.glob(f"{_FOLDERS}*"):
        _remove_if_abandoned(leftover)
    # Under another name until it is locked: an unlocked folder counts as a killed launcher's.
    made = Path(tempfile.mkdtemp(prefix=".flashtrain-"))
    descriptor = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            files.lock(descriptor)
        folder = made.rename(parent / f"{_FOLDERS}{made.name.removeprefix('.flashtrain-')}")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _remove_if_abandoned(folder: Path) -> None:
    """Removes a launcher's folder if it is this user's and the launcher is no more."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            mine = os.fstat(descriptor).st_uid == os.getuid()
            if mine and files.lock(descriptor):  # else BlockingIOError: it lives
                shutil.rmtree(folder)
        finally:
            os.close(descriptor)


def _hand_on_signals(folder: Path) -> list[int]:
    """Hands every signal on to the ranks; returns a list, to which it appends them."""
    came: list[int] = []

    def hand_on(number: int, frame: Any) -> None:
        came.append(number)
        with contextlib.suppress(OSError):
            (folder / _STOP_FILE).touch()  # for ranks that have not come to their main function
        for path in folder.glob(f"{_RANK_FILES}*"):
            _stop_child(int(path.name.removeprefix(_RANK_FILES)))

    on_stop_signals(hand_on)
    return came


def _stop_child(process: int) -> None:
    """Asks a rank to stop. One that has ended may have left its number to another process."""
    with contextlib.suppress(OSError):
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # ours: not yet reaped
        os.kill(process, signal.SIGTERM)


def _follow_launcher(launcher: str, folder: str) -> None:
    """In a rank, before all else: it ends when the launcher does."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # that has ended already
        os._exit(1)
    Path(folder, f"{_RANK_FILES}{os.getpid()}").touch()
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
    """Prints why the run failed, as one rank reports it; returns the exit code for it.

    Args:
        failures: the ranks that torch.distributed.elastic saw failing, each with its `exitcode`, in
            the order in which it saw them.
        log_dir: holds the error files, `.../<local rank>/error.json`, also of ranks it did not see.
        signals: those that the launcher has handed on to the ranks.
    """
    # The other ranks fail because of a rank that was killed or has a user's error. A rank that
    # SIGTERM has ended did not train yet. The launcher stopped it, because the launcher itself was
    # asked to stop, or because of another rank's error.
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
            causes.append((user_error, 0.0, INTERRUPTED, 128 + signals[0]))
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
    hint = ""
    if -exit_code == signal.SIGKILL:
        hint = (
            "; the machine may be out of memory (dmesg says so): lower data.batch_size or "
            "trainer.devices, or give the job more memory"
        )
    return f"error: rank {rank} was killed by {signal.Signals(-exit_code).name}{hint}"
