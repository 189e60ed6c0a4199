"""How a program reports its errors and its ranks' ends; whole runs are in tests/distributed."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashtrain import environment
from flashtrain.train import launcher

KILLED, STOPPED = -signal.SIGKILL, -signal.SIGTERM
DEFECT = (1, "Traceback ...")


def report(
    folder: Path,
    ends: dict[int, int],
    said: dict[int, tuple[int, str]],
    signals: tuple[int, ...] = (),
) -> int:
    """Of ranks that ended with exit codes in that order, and what some of them said before."""
    for rank, (code, text) in said.items():
        path = folder / "attempt_0" / str(rank) / "error.json"
        path.parent.mkdir(parents=True)
        content = {"message": {"message": text}, "time": 1e9 + rank, "exit_code": code}
        path.write_text(json.dumps(content))
    failures = {rank: SimpleNamespace(exitcode=code) for rank, code in ends.items()}
    return launcher._report_first_cause(failures, folder, signals)


@pytest.mark.parametrize(
    ("ends", "said", "signals", "code", "line"),
    [
        # The first that died, though the others had to be killed.
        ({2: KILLED, 0: KILLED, 1: KILLED}, {}, (), 1, "error: rank 2 was killed by SIGKILL; "),
        # One died; another has stumbled over it.
        ({0: 1, 1: KILLED}, {0: DEFECT}, (), 1, "error: rank 1 was killed by SIGKILL; "),
        ({0: 1, 1: STOPPED}, {0: DEFECT}, (), 1, "rank 0 failed:\nTraceback"),
        ({0: 2, 1: 1}, {0: (2, "error: no"), 1: DEFECT}, (), 2, "error: no\n"),
        ({0: 5, 1: STOPPED}, {}, (), 1, "error: rank 0 ended with exit code 5\n"),
        # The launcher was asked to stop: all have saved, one could not, some did not train yet.
        ({0: 75, 1: 75}, {0: (75, ""), 1: (75, "")}, (15,), 75, ""),
        ({0: 2, 1: 1}, {0: (2, "error: full"), 1: DEFECT}, (2, 15), 2, "error: full\n"),
        ({0: STOPPED, 1: STOPPED}, {}, (15,), 143, "interrupted before training began\n"),
        ({0: STOPPED, 1: 1}, {1: DEFECT}, (2, 15), 130, "interrupted before training began\n"),
    ],
)
def test_first_cause_is_told(
    ends: dict[int, int],
    said: dict[int, tuple[int, str]],
    signals: tuple[int, ...],
    code: int,
    line: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert report(tmp_path, ends, said, signals) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(line)
    assert bool(output.err) == bool(line)


def run_main(
    body: str, *, stdout: Any = subprocess.PIPE, stderr: Any = subprocess.PIPE, **env: str
) -> subprocess.CompletedProcess[bytes]:
    """Of a program that consists of one expression."""
    text = (
        "import sys; from flashtrain.train import console, launcher\n"
        f"sys.exit(launcher.run_main(lambda: {body}))"
    )
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, "-c", text],
        stdout=stdout,
        stderr=stderr,
        env=os.environ | {"PYTHONPATH": path} | env,
        check=False,
    )


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [("ascii", rb"a \ufffd z"), ("latin-1", rb"a \ufffd z"), ("utf-8", b"a \xef\xbf\xbd z")],
)
def test_a_terminal_that_lacks_a_character_is_no_error(encoding: str, printed: bytes) -> None:
    result = run_main(r"print('a \ufffd z')", PYTHONIOENCODING=encoding)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == printed + b"\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_left_is_no_error(stream: str, unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    say = "console.answer" if stream == "stdout" else "console.say"
    body = f"{say}('one') or {say}('two') or 0"
    try:
        if stream == "stdout":
            result = run_main(body, stdout=writer, PYTHONUNBUFFERED=unbuffered)
        else:
            result = run_main(body, stderr=writer, PYTHONUNBUFFERED=unbuffered)
    finally:
        os.close(writer)
    assert result.returncode == 0


def test_a_full_disk_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        for body in ("console.answer('one')", "print('one')"):
            result = run_main(body, stdout=full)
            assert result.returncode == 2
            assert result.stderr.startswith(b"error: ")
            assert b"the disk is full; free space there (No space left on device)" in result.stderr
            assert result.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        ("open('/nowhere/x')", 2, "error: /nowhere/x: there is no such file or folder"),
        ("open('/proc/version/x')", 2, "error: /proc/version/x: a part of the path is a file"),
        ("open('a' * 300)", 2, "error: aaaa"),
        ("len(3)", 1, "Traceback"),
        ("(_ for _ in ()).throw(BlockingIOError(11, 'x'))", 2, "error: x"),
        ("(_ for _ in ()).throw(OSError('AF_UNIX path too long'))", 2, "error: AF_UNIX path"),
        ("bytearray(2**62)", 2, "error: the machine is out of memory"),
        ('(_ for _ in ()).throw(RuntimeError("can\'t start new thread"))', 2, "error: the system"),
        ("sys.exit(5)", 5, ""),
        ("sys.exit()", 0, ""),
    ],
)
def test_what_ends_a_program_has_one_line_and_a_code(
    body: str, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {number: signal.getsignal(number) for number in environment.STOP_SIGNALS}
    main = eval(f"lambda: {body}", {"sys": sys})
    assert launcher.run_main(main) == code
    for number, handler in before.items():
        signal.signal(number, handler)
    said = capsys.readouterr().err
    assert said.startswith(line)
    assert code == 1 or said.count("\n") <= 1


def test_work_that_is_interrupted_may_tidy_up() -> None:
    body = """
        import os, signal, sys
        from flashtrain.train import launcher
        def main():
            try:
                with launcher.interruptible("kept"):
                    os.kill(os.getpid(), signal.SIGHUP)
            finally:
                print("tidy")
        sys.exit(launcher.run_main(main))
    """
    result = python(body)
    assert (result.returncode, result.stdout, result.stderr) == (129, b"tidy\n", b"kept\n")


def test_folders_of_killed_launchers_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "flashtrain-launch-others").write_text("a file is none of ours")
    body = """
        import os, sys, tempfile
        from flashtrain.train import launcher
        with launcher._folder() as folder:
            (folder / "error.json").touch()
            print(folder, flush=True)
            sys.stdin.read()
    """
    with python_process(body, TMPDIR=str(tmp_path)) as process:
        assert process.stdout is not None
        other = Path(os.fsdecode(process.stdout.readline().rstrip()))
        with launcher._folder() as folder:
            assert folder.parent == other.parent == tmp_path
            assert other.is_dir()  # its launcher lives
        assert not folder.exists()
        process.kill()
        process.wait()
    assert other.is_dir()
    with launcher._folder():
        assert not other.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["flashtrain-launch-others"]


def test_only_children_are_stopped() -> None:
    with python_process("import sys; sys.stdin.read()") as process:
        stranger = os.getppid()
        launcher._stop_child(stranger)  # would end this test
        launcher._stop_child(process.pid)
        assert process.wait(10) == -signal.SIGTERM
        launcher._stop_child(process.pid)  # whose number another may have


def python(body: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    with python_process(body, **env) as process:
        out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess([], process.returncode, out, err)


def python_process(body: str, **env: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(body)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | env,
    )
