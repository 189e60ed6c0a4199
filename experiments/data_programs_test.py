"""prepare_data and inspect_data as a user calls them."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

_PROGRAMS = Path(os.environ["TEST_SRCDIR"], os.environ["TEST_WORKSPACE"], "experiments")


def call(program: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    env = dict(os.environ, BUILD_WORKING_DIRECTORY=str(folder), DATA_DIR=str(folder / "data"))
    return subprocess.run(
        [str(_PROGRAMS / program), *arguments], env=env, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Forty documents in text/, prepared in tokens/."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "text").mkdir()
    for number in range(40):
        (folder / "text" / f"{number:02d}.txt").write_text(f"This is document {number}. " * 50)
    # Two workers: shared by a hundred cores, so few tokens may be less than one a second for each.
    arguments = ("--dataset=text:text/*.txt", "--out=tokens", "--workers=2")
    first = call("prepare_data", *arguments, folder=folder)
    assert first.returncode == 0, first.stderr
    summary = json.loads(first.stdout.splitlines()[-1])
    assert summary["documents"] == 40
    assert summary["tokens"] > 40 * 50 * 4
    assert summary["seconds"] > 0
    assert summary["tokens_per_second_per_core"] > 0
    assert summary["manifest"] == str(folder / "tokens" / "manifest.json")
    return folder


def test_a_second_run_does_nothing_and_verifies(folder):
    before = {path: path.stat().st_mtime_ns for path in (folder / "tokens").iterdir()}
    arguments = ("--dataset=text:text/*.txt", "--out=tokens", "--verify")
    again = call("prepare_data", *arguments, folder=folder)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["tokens_per_second_per_core"] is None
    assert "all checksums are right" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in (folder / "tokens").iterdir()} == before


def test_verify_finds_a_flipped_bit(folder):
    arguments = ("--dataset=text:text/*.txt", "--out=damaged")
    assert call("prepare_data", *arguments, folder=folder).returncode == 0
    path = folder / "damaged" / "train.documents.bin"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    result = call("prepare_data", *arguments, "--verify", folder=folder)
    assert result.returncode == 2
    assert "train.documents.bin is damaged: its SHA-256 is not the manifest's" in result.stderr


def test_the_default_folder_is_in_data_dir(folder):
    result = call("prepare_data", "--dataset=shakespeare", "--workers=1", folder=folder)
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["manifest"] == str(folder / "data" / "shakespeare" / "manifest.json")
    assert (summary["documents"], summary["tokens"]) == (42, 4_836_952 + 201_624)


def test_inspect(folder):
    result = call(
        "inspect_data",
        "--path=tokens",
        "--seq_len=32",
        "--window=0",
        "--step=2",
        "--global_batch_size=4",
        folder=folder,
    )
    assert result.returncode == 0, result.stderr
    text = result.stdout
    assert '"format": "flashtrain-tokens"' in text
    assert "This is document" in text
    lines = [line for line in text.splitlines() if line.startswith("sample ")]
    assert [line.split(":")[0] for line in lines] == [f"sample {n}" for n in range(8, 12)]
    assert all(": tokens window " in line and ", document" in line for line in lines)


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("prepare_data", [], "--dataset=<name> says what to prepare"),
        ("prepare_data", ["--datset=x"], "there is no flag --datset; did you mean '--dataset'?"),
        ("prepare_data", ["--dataset=opnwebtext"], "did you mean 'openwebtext'?"),
        ("prepare_data", ["--dataset=text:*.none"], "no file matches"),
        (
            "prepare_data",
            ["--dataset=text:text/*.txt", "--workers=-1"],
            "--workers=-1 must be from 0",
        ),
        ("prepare_data", ["--dataset=text:text/*.txt", "--workers=x"], "invalid int value: 'x'"),
        ("prepare_data", ["--dataset=shakespeare", "--out=tokens"], "holds other data"),
        (
            "prepare_data",
            ["--dataset=text:text/*.txt", "--workers=9999"],
            "from 0 to 4,096",
        ),
        ("prepare_data", ["--dataset=text:text/*.txt", "--out="], "--out= names no folder"),
        ("prepare_data", ["--dataset=text:text/*.txt", "--out=~no-such-user/x"], "is no path"),
        ("prepare_data", ["--dataset=text:text/*.txt", "--out=text"], "holds other files than"),
        ("inspect_data", ["--path=tokens", f"--step={2**62}"], "is too far"),
        ("inspect_data", [], "give either --path=<folder> or --dataset=<name>"),
        ("inspect_data", ["--path=nowhere"], "no prepared data at"),
        ("inspect_data", ["--path=tokens", "--window=-1"], "--window=-1 must be in [0, "),
    ],
)
def test_a_mistake_is_one_line(folder, program, arguments, message):
    result = call(program, *arguments, folder=folder)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_of_its_processes_is_one_line(folder, number):
    """As terminals and clusters send them."""
    words = " ".join(f"word{i % 997} and" for i in range(200_000))
    (folder / "long.jsonl").write_text(
        "".join(json.dumps({"text": words}) + "\n" for _ in range(12))
    )
    out = f"stopped{int(number)}"
    command = [str(_PROGRAMS / "prepare_data"), "--dataset=jsonl:long.jsonl:text", f"--out={out}"]
    env = dict(os.environ, BUILD_WORKING_DIRECTORY=str(folder))
    run = subprocess.Popen(
        command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (folder / f".{out}.partial" / "chunks").exists():
        assert run.poll() is None
        time.sleep(0.01)
    os.killpg(run.pid, number)
    _, errors = run.communicate(timeout=300)  # until the last of its processes has ended
    assert run.returncode == 128 + number, errors
    assert errors.splitlines()[1:] == ["interrupted; what is done is kept, run it again to go on"]


def test_help(folder):
    for program in ("prepare_data", "inspect_data"):
        result = call(program, "--help", folder=folder)
        assert result.returncode == 0
        assert "tools/bazel run //experiments:" in result.stdout
