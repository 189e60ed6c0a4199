"""A loss that is not finite: steps are skipped, then the run stops and keeps what is good."""

from pathlib import Path

import train_binary
from train_binary import SMALL_MODEL

DIVERGED = 3


def test_stops_after_ten_bad_steps_in_a_row(tmp_path: Path) -> None:
    data = train_binary.make_data(tmp_path / "words")
    # The first update throws the weights so far that every later loss overflows.
    flags = ("--config.optim.lr=1e30", "--config.optim.warmup_steps=0")
    run = tmp_path / "run"
    for attempt in ("first", "again"):  # a run that diverged does so again, and is not made worse
        result = train_binary.run(
            *SMALL_MODEL,
            data,
            *flags,
            "--config.trainer.save_every=1",
            f"--workdir={run}",
            cwd=tmp_path,
        )
        assert result.returncode == DIVERGED, attempt
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        skipped = [line for line in result.stderr.splitlines() if " skipped: loss " in line]
        assert len(skipped) == 10
        assert skipped[0].startswith("step 2 skipped: loss nan")
        assert skipped[0].endswith("(1 in a row)")
        assert result.stderr.splitlines()[-1] == (
            "error: loss or gradient was not finite 10 steps in a row, up to step 11; the last "
            f"good checkpoint is kept in {run / 'checkpoints'}: lower optim.lr, or use precision "
            "bf16 or fp32, in another --workdir"
        )
        assert train_binary.checkpoint_steps(run) == [1]
        assert not (run / "summary.json").exists()
    assert train_binary.losses(run)[1] < 6
    assert train_binary.losses(run)[2] is None


def test_single_bad_steps_are_passed_over(tmp_path: Path) -> None:
    """fp16 starts with a loss scale that overflows: those steps are skipped and the run goes on."""
    summary = train_binary.train(
        *SMALL_MODEL,
        train_binary.make_data(tmp_path / "words"),
        "--config.trainer.precision=fp16",
        "--config.model.init_std=2.0",
        "--workdir=run",
        cwd=tmp_path,
    )
    assert 0 < summary["skipped_steps"] < 24
    assert summary["step"] == 24
    losses = train_binary.losses(tmp_path / "run")
    assert losses[24] < losses[1]
