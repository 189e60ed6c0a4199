"""What a program makes of its errors and its ranks' ends; whole runs are in tests/distributed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

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
        result = run_main("console.answer('one')", stdout=full)
    assert result.returncode != 0
    assert b"No space left on device" in result.stderr
