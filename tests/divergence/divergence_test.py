"""A loss that is not finite: steps are skipped, then the run stops and keeps what is good."""

import json
import shutil
from pathlib import Path

import numpy as np
import train_binary
from train_binary import SMALL_MODEL

from flashtrain.data import TokenDataset
from flashtrain.data.token_files import write_token_files

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
        assert "(1 in a row); not finite, from micro batch 0 (samples 8 to 15)" in skipped[0]
        assert result.stderr.splitlines()[-1] == (
            "error: loss or gradient was not finite or spiked 10 steps in a row, up to step 11; "
            f"the last good checkpoint, of step 1, is kept in {run / 'checkpoints'}: lower "
            "optim.lr, or use precision bf16 or fp32, in another --workdir"
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


BAD_STEP = 250  # 0-based, of 270
NOISY = (2004, 2005)  # its third micro batch, of two samples in a batch of eight


def _data_with_noise(folder: Path) -> tuple[str, list[int]]:
    """Words, but for the windows of the samples NOISY; the flag, and these windows."""
    flag = train_binary.make_data(folder)
    dataset = TokenDataset(folder, seq_len=32, seed=1111)
    _, windows = dataset.locate(np.array(NOISY))
    source = dataset.sources[0]
    tokens, val = np.array(source.train.tokens), np.array(source.val.tokens)
    noise = np.random.default_rng(0).integers(0, 256, 31)
    for window in windows:
        tokens[32 * window + 1 : 32 * window + 32] = noise  # none that another window shares
    shutil.rmtree(folder)
    write_token_files(
        folder,
        {"train": tokens, "val": val},
        tokenizer="bytes",
        vocab_size=256,
        source={"name": "words"},
    )
    return flag, windows.tolist()


def test_spike_is_skipped_and_its_samples_named(tmp_path: Path) -> None:
    data, windows = _data_with_noise(tmp_path / "words")
    result = train_binary.run(
        *SMALL_MODEL,
        data,
        "--config.trainer.max_steps=270",
        "--config.data.batch_size=2",
        "--config.trainer.log_every=50",
        "--config.trainer.eval_every=0",
        "--config.trainer.spike_zscore=6",
        "--workdir=run",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    (at,) = (i for i, line in enumerate(lines) if " skipped: " in line)
    assert lines[at].startswith(f"step {BAD_STEP + 1} skipped: loss ")
    assert lines[at].endswith("; a spike, from micro batch 2 (samples 2004 to 2005)")
    for line, sample, window in zip(lines[at + 1 : at + 3], NOISY, windows, strict=True):
        assert line.startswith(
            f"  sample {sample}: words window {window}, tokens {32 * window:,} to "
            f"{32 * window + 32:,}"
        )
    summary = json.loads(result.stdout.splitlines()[-1])
    assert (summary["step"], summary["skipped_steps"]) == (270, 1)
