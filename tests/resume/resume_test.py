"""A run that was killed and started again ends bit for bit like one that was not."""

import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
import train_binary
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from train_binary import SMALL_MODEL

from flashtrain.train import checkpoint

INTERRUPTED = 75


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return (*SMALL_MODEL, train_binary.make_data(tmp_path_factory.mktemp("data") / "words"))


@pytest.fixture(scope="module")
def undisturbed(flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train_binary.train(*flags, "--workdir=run", cwd=folder)
    return folder / "run"


def assert_whole_tensorboard(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for name, steps in (("train/loss", range(1, 25)), ("val/loss", (10, 20, 24))):
        logged = {event.step: event.value for event in events.Scalars(name)}
        assert [event.step for event in events.Scalars(name)] == list(steps), name
        assert logged == pytest.approx(train_binary.losses(run, name))  # TensorBoard keeps fp32
    texts = {f"{name}/text_summary" for name in ("config", "command", "environment", "sample")}
    assert texts <= set(events.Tags()["tensors"])
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = HParamsPluginData.FromString(content).session_start_info
    assert start.hparams["trainer.max_steps"].number_value == 24
    assert start.hparams["model.d_model"].number_value > 0


def test_undisturbed_run_learns_and_logs_every_step(undisturbed: Path) -> None:
    losses = train_binary.losses(undisturbed)
    assert sorted(losses) == list(range(1, 25))
    assert losses[24] < losses[1]
    assert sorted(train_binary.losses(undisturbed, "val/loss")) == [10, 20, 24]
    assert_whole_tensorboard(undisturbed)


# Two runs that between them have all state there is: averaged weights and a growing batch; a loss
# scale, fp32 copies of the weights and the running means of the guard. Both draw dropout masks.
KILLED_RUNS = {
    "fp32": (
        "--config.trainer.ema_decay=0.9",
        "--config.trainer.batch_ramp_from=4",
        "--config.trainer.batch_ramp_steps=30",
        "--config.data.batch_size=4",
    ),
    "fp16": (
        "--config.trainer.precision=fp16",
        "--config.trainer.low_precision_weights=true",
        "--config.trainer.spike_zscore=8",
    ),
}
KILLS = 10  # of each


def kill_at_random(flags: Sequence[str], cwd: Path, random: Random) -> bool:
    """Starts the run, kills it at some moment; whether that cut off a save."""
    run, saves = cwd / "run", cwd / "run" / "checkpoints"
    restarted = max(train_binary.checkpoint_steps(run), default=0)
    left = set(saves.glob(".tmp-step_*"))  # by the process killed before

    def saving() -> bool:
        return bool(set(saves.glob(".tmp-step_*")) - left)

    with train_binary.HeldRun(*flags, cwd=cwd) as held:
        if random.random() < 0.5:
            held.read_until(f"step {restarted + random.randint(1, 5)}/")
            held.read_for(random.random() * 0.03, lines=2)
        else:
            for step in range(restarted + 2, restarted + 7, 2):  # a save each
                held.read_until(f"step {step}/")
                saved = checkpoint.path_of(saves, step)
                held.wait_until(lambda saved=saved: saving() or saved.exists())
                time.sleep(random.random() * 0.003)
                held.process.send_signal(signal.SIGSTOP)
                if saving():
                    break
                held.process.send_signal(signal.SIGCONT)  # too late for this one
        held.process.kill()
        assert held.process.wait() == -signal.SIGKILL
    return saving()


@pytest.mark.parametrize("name", KILLED_RUNS)
def test_killed_at_random(name: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    random = Random(name)
    long = (
        *(*flags, *KILLED_RUNS[name], "--workdir=run"),
        *("--config.trainer.max_steps=100", "--config.trainer.save_every=2"),
    )
    cut_off = sum(kill_at_random(long, tmp_path, random) for _ in range(KILLS))
    assert cut_off > 0, "no kill hit a save"
    assert not (tmp_path / "run" / "summary.json").exists()
    train_binary.train(*long, cwd=tmp_path)
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp-*"))
    (tmp_path / "undisturbed").mkdir()
    train_binary.train(*long, cwd=tmp_path / "undisturbed")
    train_binary.assert_same_run(tmp_path / "run", tmp_path / "undisturbed" / "run")


def test_tensorboard_is_whole_after_a_kill(
    flags: tuple[str, ...], undisturbed: Path, tmp_path: Path
) -> None:
    with train_binary.HeldRun(*flags, "--workdir=run", cwd=tmp_path) as held:
        held.read_until("step 14/24")
    train_binary.train(*flags, "--workdir=run", cwd=tmp_path)
    train_binary.assert_same_run(tmp_path / "run", undisturbed)
    assert_whole_tensorboard(tmp_path / "run")


@pytest.mark.parametrize("listener", ["reads on", "leaves"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_saves_and_leaves(
    number: signal.Signals,
    listener: str,
    flags: tuple[str, ...],
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    """Also where nobody is left who reads what it says, as when `| tee log` gets the same ^C."""
    run = tmp_path / "run"
    with train_binary.HeldRun(*flags, "--workdir=run", cwd=tmp_path) as held:
        held.read_until("step 7/24")
        held.process.send_signal(number)
        if listener == "reads on":
            held.process.send_signal(number)  # once more changes nothing
            assert held.read_to_end() == INTERRUPTED
            assert "stopped by a signal after step" in held.output
            assert "Traceback" not in held.output
        else:
            held.close_output()
            assert held.process.wait(train_binary.TIMEOUT_SECONDS) == INTERRUPTED
    stopped_at = train_binary.checkpoint_steps(run)[-1]
    assert max(train_binary.losses(run)) == stopped_at
    assert stopped_at <= 12  # it was in step 9 at most; what a GPU computed is read a step later
    result = train_binary.run(*flags, "--workdir=run", cwd=tmp_path)
    assert result.returncode == 0
    assert f"continuing from step {stopped_at}" in result.stderr
    train_binary.assert_same_run(run, undisturbed)


def test_a_run_that_nobody_listens_to_ends_well(
    flags: tuple[str, ...], undisturbed: Path, tmp_path: Path
) -> None:
    with train_binary.HeldRun(*flags, "--workdir=run", cwd=tmp_path) as held:
        held.read_until("step 3/24")
        held.close_output()
        assert held.process.wait(train_binary.TIMEOUT_SECONDS) == 0
    train_binary.assert_same_run(tmp_path / "run", undisturbed)


def test_finished_run_says_so_and_changes_nothing(
    flags: tuple[str, ...], undisturbed: Path
) -> None:
    before = train_binary.files(undisturbed)
    result = train_binary.run(*flags, f"--workdir={undisturbed}", cwd=undisturbed.parent)
    assert result.returncode == 0
    assert "this run has finished: step 24 of 24" in result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary == json.loads((undisturbed / "summary.json").read_text())
    assert train_binary.files(undisturbed) == before


def test_second_run_in_the_same_folder_is_refused(flags: tuple[str, ...], tmp_path: Path) -> None:
    arguments = (*flags, "--workdir=run")
    with train_binary.HeldRun(*arguments, cwd=tmp_path) as held:
        held.read_until("step 1/24")
        message = train_binary.error_line(*arguments, cwd=tmp_path)
        assert f"process {held.process.pid} is training in {tmp_path / 'run'}" in message
        assert held.process.poll() is None


def test_resume_continues_the_last_run_of_a_config(flags: tuple[str, ...], tmp_path: Path) -> None:
    message = train_binary.error_line(*flags, "--resume", cwd=tmp_path)
    assert message.startswith(
        f"--resume: there is no run with checkpoints in {tmp_path / 'runs' / 'quickstart'}; "
    )
    message = train_binary.error_line(*flags, "--resume", "--workdir=new", cwd=tmp_path)
    assert message.startswith(f"--resume: there is no checkpoint in {tmp_path / 'new'}")
    first = train_binary.train(*flags, cwd=tmp_path)
    longer = train_binary.train(*flags, "--resume", "--config.trainer.max_steps=26", cwd=tmp_path)
    assert longer["workdir"] == first["workdir"]
    assert sorted(train_binary.losses(Path(first["workdir"]))) == list(range(1, 27))
