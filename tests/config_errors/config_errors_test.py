"""Every mistake on the command line gets one line that says what to do, and writes nothing."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import train_binary
from train_binary import SMALL_MODEL

from experiments import train as program
from flashtrain.environment import STOP_SIGNALS
from flashtrain.train import launcher


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_binary.make_data(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A program that has ended leaves them ignored."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


MISTAKES = [
    (["--confg=x"], "there is no flag --confg; did you mean '--config'?"),
    (["--wrkdir=x"], "there is no flag --wrkdir; did you mean '--workdir'?"),
    (["--print_config=maybe"], "--print_config=maybe is not true or false; use one such as"),
    (["run"], "unexpected argument 'run': flags are --name=value"),
    (["--config"], "--config needs a value, as in --config=configs/quickstart.py"),
    (
        ["--config=configs/gtp2s.py"],
        "there is no config file 'configs/gtp2s.py'; did you mean 'configs/gpt2s.py'?",
    ),
    (
        ["--config=/nowhere/quickstart"],
        "there is no config file '/nowhere/quickstart'; did you mean 'configs/quickstart.py'?",
    ),
    (["--config=configs/gpt2s.py:plan"], "gpt2s has no variant 'plan'; supported: plain"),
    (
        ["--config=configs/gpt3l.py:60b"],
        "gpt3l has no variant '60b'; supported: 30b, 8k, plain, rotary",
    ),
    (["--config=configs/variants.py"], "has no function get_config; recipes: configs/"),
    (
        ["--config.trainer.max_step=1"],
        "there is no config key 'trainer.max_step'; did you mean 'trainer.max_steps'?",
    ),
    (["--config.max_steps=1"], "there is no config key 'max_steps'; did you mean"),
    (["--config.optim=1"], "config.optim is a section; set its keys, as in --config.optim."),
    (
        ["--config.trainer.max_steps=many"],
        "--config.trainer.max_steps=many is not an integer; use one such as "
        "--config.trainer.max_steps=",
    ),
    (["--config.optim.lr=fast"], "--config.optim.lr=fast is not a number"),
    (["--config.trainer.compile=maybe"], "--config.trainer.compile=maybe is not true or false"),
    (["--config.optim.betas=(0.9,)"], "config key optim.betas must be 2 numbers, got (0.9,)"),
    (["--config.optim.lr=-1"], "config key optim.lr must be at least 0, got -1.0"),
    (["--config.trainer.max_steps=0"], "config key trainer.max_steps must be at least 1, got 0"),
    (
        ["--config.trainer.precision=bf17"],
        "config key trainer.precision: 'bf17' is not known; did you mean 'bf16'?",
    ),
    (
        ["--config.trainer.strategy=fsdp"],
        "config key trainer.strategy: 'fsdp' is not known; did you mean 'fsdp2'?",
    ),
    (["--config.model.family=gtp"], "config key model.family: 'gtp' is not known; did you mean"),
    (
        ["--config.trainer.batch_ramp_from=3", "--config.trainer.batch_ramp_steps=5"],
        "trainer.global_batch_size=8 is not a multiple of trainer.batch_ramp_from=3, by which the "
        "batch grows; the nearest that are: 6 or 9",
    ),
    (
        ["--config.optim.schedule=cosin"],
        "config key optim.schedule: 'cosin' is not known; did you mean 'cosine'?",
    ),
    (
        ["--config.data.batch_size=3"],
        "trainer.global_batch_size=8 on 1 processes cannot be cut into micro batches of "
        "data.batch_size=3; the nearest data.batch_size that fit: 2 or 4; the nearest "
        "trainer.global_batch_size: 6 or 9",
    ),
    (
        ["--config.trainer.devices=3"],
        "trainer.global_batch_size=8 cannot be shared evenly by 3 processes; the nearest that "
        "can: 6 or 9",
    ),
    (
        ["--config.data.seq_len=4096"],
        "data.seq_len=4096 is longer than model.max_seq_len=128; lower the one or raise the other",
    ),
    (["--config.model.num_heads=3"], "model.d_model=32 is not a multiple of model.num_heads=3"),
    (["--config.data.path=/nowhere"], "/nowhere"),
    (
        ["--config.data.path=", "--config.data.source=shakespear"],
        "dataset 'shakespear' is unknown; did you mean 'shakespeare'?",
    ),
    (
        ["--config.data.path=", "--config.data.source="],
        "neither data.path nor data.source is set; set one of them",
    ),
    (["--workdir=/proc/run"], "cannot write to the run folder /proc/run: "),
]


@pytest.mark.parametrize(("arguments", "expected"), MISTAKES, ids=lambda v: str(v)[:40])
def test_mistake(
    arguments: list[str],
    expected: str,
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The whole program, but in this process: starting each would take seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", *SMALL_MODEL, data, *arguments])
    assert launcher.run_main(program.main) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert expected in output.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [0, 4, 8, 17, -3])
def test_mistake_in_a_process_of_its_own(number: int, data: str, tmp_path: Path) -> None:
    arguments, expected = MISTAKES[number]
    message = train_binary.error_line(*SMALL_MODEL, data, *arguments, cwd=tmp_path)
    assert expected in message
    assert list(tmp_path.iterdir()) == []


def test_run_folder_below_a_file(data: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    message = train_binary.error_line(*SMALL_MODEL, data, "--workdir=file/run", cwd=tmp_path)
    assert message == (
        f"cannot write to the run folder {tmp_path}/file/run: {tmp_path}/file is a file; choose "
        "another with --workdir"
    )
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_run_folder_without_permission(data: str, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    message = train_binary.error_line(*SMALL_MODEL, data, "--workdir=locked/run", cwd=tmp_path)
    assert "no permission to write in" in message


def test_print_config_reads_back(tmp_path: Path) -> None:
    arguments = ["--config=configs/gpt3l.py:8k", "--config.optim.betas=(0.8,0.95)"]
    first = train_binary.run(*arguments, "--print_config", cwd=tmp_path)
    assert first.returncode == 0
    assert first.stderr == ""
    printed = dict(line.split("=", 1) for line in first.stdout.splitlines())
    assert printed["--config.data.seq_len"] == "8192"
    assert printed["--config.optim.betas"] == "(0.8, 0.95)"
    assert printed["--config.trainer.keep_checkpoints"] == "2"
    assert list(tmp_path.iterdir()) == []


def test_help_is_short(tmp_path: Path) -> None:
    result = train_binary.run("--help", cwd=tmp_path)
    assert result.returncode == 0
    assert result.stderr == ""
    for word in ("--config", "--workdir", "--print_config", "configs/quickstart.py"):
        assert word in result.stdout
    assert len(result.stdout.splitlines()) < 20


def test_config_of_ones_own(data: str, tmp_path: Path) -> None:
    """A recipe outside the repository, without .py, relative to the folder bazel run came from."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "tiny.py").write_text(
        "def get_config(arg='2'):\n"
        "    return {'model': {'num_layers': int(arg), 'd_model': 16, 'num_heads': 2,\n"
        "                      'vocab_size': 0, 'max_seq_len': 0, 'fused': False},\n"
        "            'data': {'seq_len': 16, 'batch_size': 2},\n"
        "            'trainer': {'max_steps': 3, 'global_batch_size': 4, 'sample_tokens': 0}}\n"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    summary = train_binary.train(
        "--config=mine/tiny:1", data, cwd=elsewhere, BUILD_WORKING_DIRECTORY=str(tmp_path)
    )
    assert summary["config"]["name"] == "tiny-1"
    assert summary["config"]["model"]["num_layers"] == 1
    workdir = Path(summary["workdir"])
    assert workdir.parent == tmp_path / "runs" / "tiny-1"
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert list(elsewhere.iterdir()) == []
