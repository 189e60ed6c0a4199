"""Draws the loss curves of runs.

Example:
  tools/bazel run //experiments:plot_loss -- --runs=runs/quickstart/20260102-030405 --out=loss.svg
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from absl import app, flags

from experiments import command_line

_RUNS = flags.DEFINE_list("runs", [], "run folders, each with an optional label: label=folder,...")
_OUT = flags.DEFINE_string("out", "loss.svg", "the picture to write: .svg, .png or .pdf")


def read_scalar(run: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a scalar in a run's metrics.jsonl, without those that were not finite."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [entry for entry in map(json.loads, lines) if entry.get(name) is not None]
    return [entry["step"] for entry in entries], [entry[name] for entry in entries]


def draw(runs: list[tuple[str, Path]], out: Path) -> None:
    """One training curve and one validation curve for each (label, run folder)."""
    plt.rcParams["svg.hashsalt"] = "flashtrain"  # the same picture has the same bytes
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for label, run in runs:
        train = axes.plot(
            *read_scalar(run, "train/loss"), linewidth=1, alpha=0.6, label=f"{label} train".strip()
        )
        axes.plot(
            *read_scalar(run, "val/loss"),
            "o-",
            color=train[0].get_color(),
            markersize=4,
            label=f"{label} validation".strip(),
        )
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(out, dpi=150, metadata={"Date": None} if out.suffix == ".svg" else None)


def main(argv: list[str]) -> None:
    command_line.enter_user_folder()
    if len(argv) > 1 or not _RUNS.value:
        sys.exit(
            "plot_loss: --runs=[label=]<folder>,... names the runs to draw; --help shows the flags"
        )
    runs = []
    for run in _RUNS.value:
        label, _, folder = run.rpartition("=")
        if not Path(folder, "metrics.jsonl").is_file():
            sys.exit(f"plot_loss: {folder} is no run folder: it has no metrics.jsonl")
        runs.append((label, Path(folder)))
    out = Path(_OUT.value)
    try:
        draw(runs, out)
    except (OSError, ValueError) as error:  # ValueError: matplotlib does not know the file's ending
        sys.exit(f"plot_loss: cannot write {out}: {error}")
    print(out.absolute())


if __name__ == "__main__":
    app.run(main)
