"""The plot program as a user calls it."""

import json
import os
import subprocess
from pathlib import Path

_PROGRAM = Path(os.environ["TEST_SRCDIR"], os.environ["TEST_WORKSPACE"], "experiments/plot_loss")


def plot(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    env = dict(os.environ, BUILD_WORKING_DIRECTORY=str(folder), MPLCONFIGDIR=str(folder / "mpl"))
    return subprocess.run(
        [str(_PROGRAM), *arguments], env=env, capture_output=True, text=True, check=False
    )


def write_run(run: Path, losses: list[float | None]) -> None:
    run.mkdir()
    lines = [json.dumps({"step": i, "train/loss": loss}) for i, loss in enumerate(losses)]
    lines.append(json.dumps({"step": len(losses) - 1, "val/loss": losses[-1]}))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_draws_both_curves_of_each_run(tmp_path):
    write_run(tmp_path / "a", [3.0, None, 2.0])  # null: a loss that was not finite
    write_run(tmp_path / "b", [4.0, 3.5])
    result = plot("--runs=first=a,second=b", "--out=loss.svg", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    picture = (tmp_path / "loss.svg").read_text()
    assert picture.count('<g id="line2d_') >= 4  # axes' ticks are line2d too
    for label in ("first train", "first validation", "second train", "second validation"):
        assert f"<!-- {label} -->" in picture


def test_names_may_hold_what_separates_them(tmp_path):
    for name in ("lr=0.1,wd=0", "[b] *", "c"):
        write_run(tmp_path / name, [3.0, 2.0])
    with open(tmp_path / "c" / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "trai')  # which a run is writing now
    result = plot("--runs=lr=0.1,wd=0,$x=[b] *", "--runs=c=c", "--out=a=b.svg", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    picture = (tmp_path / "a=b.svg").read_text()
    for label in ("train", "$x train", "c train"):
        assert f"<!-- {label} -->" in picture


def test_a_mistake_is_one_line(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "metrics.jsonl").write_text('{"step": 1}\n[' + "[" * 100_000 + "\n")
    write_run(tmp_path / "b", [4.0, 3.5])
    for arguments, message in (
        ([], "--runs"),
        (["--runs=a"], "a is no run folder"),
        (["--runs=b,a=a,b"], "a is no run folder"),
        (["--runs=d"], "d/metrics.jsonl, line 2 is no entry of a run's metrics"),
        (["--runs=b", "--out=loss.docx"], "cannot write loss.docx"),
        (["--runs=b", "--out=missing/loss.svg"], "cannot write missing/loss.svg"),
    ):
        result = plot(*arguments, folder=tmp_path)
        assert result.returncode == 2
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
