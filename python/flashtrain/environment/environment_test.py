"""What the shell has left decides nothing silently."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from flashtrain import environment
from flashtrain.environment import Ranks
from flashtrain.errors import UserError

COMPLETE = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*COMPLETE, "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({}, None),
        (COMPLETE, Ranks(1, 4, 1, 4)),
        (COMPLETE | {"LOCAL_WORLD_SIZE": "2"}, Ranks(1, 4, 1, 2)),
        (COMPLETE | {"LOCAL_WORLD_SIZE": ""}, Ranks(1, 4, 1, 4)),
        ({"WORLD_SIZE": ""}, None),
        ({"RANK": "0"}, None),
        ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "pod", "MASTER_PORT": "1"}, None),
        ({"MASTER_ADDR": "elsewhere"}, None),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),
        (COMPLETE | {"SLURM_STEP_NUM_TASKS": "4"}, Ranks(1, 4, 1, 4)),
    ],
)
def test_ranks(variables, ranks, monkeypatch) -> None:
    set_all(monkeypatch, variables)
    assert environment.ranks() == ranks
    assert environment.is_worker() == (ranks is not None)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PO"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "RANK=0, WORLD_SIZE=2 are set, but LOCAL_RANK"),
        ({"RANK": "3"}, "RANK=3 is set"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x is set"),
        (COMPLETE | {"RANK": "4"}, "RANK=4, WORLD_SIZE=4, LOCAL_RANK=1, .* which contradict"),
        (COMPLETE | {"RANK": "-1"}, "which contradict"),
        (COMPLETE | {"WORLD_SIZE": "four"}, "WORLD_SIZE=four, .* which contradict"),
        (COMPLETE | {"LOCAL_RANK": "2"}, "which contradict"),
        (COMPLETE | {"LOCAL_WORLD_SIZE": "1"}, "LOCAL_WORLD_SIZE=1 are set, which contradict"),
        (COMPLETE | {"MASTER_PORT": "99999"}, "which contradict"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "srun has started this program 8 times"),
    ],
)
def test_contradictions_are_named(variables, message, monkeypatch) -> None:
    set_all(monkeypatch, variables)
    with pytest.raises(UserError, match=message):
        environment.ranks()
    assert not environment.is_worker()


@pytest.mark.parametrize("value", ["0", "abc", "-2", "4,x", "100000", "1.5"])
def test_wrong_thread_counts(value, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    with pytest.raises(UserError, match=r"OMP_NUM_THREADS=.* must be a number of threads"):
        environment.check_threads()


@pytest.mark.parametrize(("value", "left"), [("", None), (" ", None), ("4", "4"), ("4,2", "4,2")])
def test_right_thread_counts(value, left, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    environment.check_threads()
    assert os.environ.get("OMP_NUM_THREADS") == left


def test_a_user_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUILD_WORKING_DIRECTORY", str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"BUILD_WORKING_DIRECTORY=.*gone cannot be entered"):
        environment.enter_user_folder()
    monkeypatch.setenv("BUILD_WORKING_DIRECTORY", "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    os.chdir("here")
    (tmp_path / "here").rmdir()
    with pytest.raises(UserError, match="the current folder cannot be entered"):
        environment.enter_user_folder()


def program(body: str, *, shell: str = "", **variables: str) -> subprocess.CompletedProcess[bytes]:
    text = "from flashtrain import environment\n" + textwrap.dedent(body)
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        ["bash", "-c", f'"$0" "$@" {shell}', sys.executable, "-c", text],
        env=os.environ | {"PYTHONPATH": path} | variables,
        capture_output=True,
        timeout=60,
        check=False,
    )


def test_closed_streams_are_opened(tmp_path: Path) -> None:
    """Else the first file that is opened becomes what libraries write warnings to."""
    body = f"""
        environment.start()
        import sys
        file = open({str(tmp_path / "file")!r}, "w")
        print("a"); print("b", file=sys.stderr)
        assert file.fileno() > 2 and sys.stdin.read() == ""
        open({str(tmp_path / "done")!r}, "w")
    """
    result = program(body, shell="<&- >&- 2>&-")
    assert result.returncode == 0
    assert (tmp_path / "done").exists()
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize("number", environment.STOP_SIGNALS)
def test_a_signal_at_the_start_is_one_line(number: int) -> None:
    body = f"environment.start('stopped')\nimport os\nos.kill(os.getpid(), {int(number)})"
    result = program(body)
    assert (result.returncode, result.stderr) == (128 + number, b"stopped\n")


def test_nohup_is_respected() -> None:
    body = """
        import signal
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        environment.start()
        signal.raise_signal(signal.SIGHUP)
    """
    assert program(body).returncode == 0


def test_a_rank_leaves_the_word_to_its_launcher() -> None:
    body = """
        import signal
        environment.start()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    """
    result = program("import os, sys\n" + textwrap.dedent(body), **COMPLETE)
    assert (result.returncode, result.stderr) == (-signal.SIGTERM, b"")
