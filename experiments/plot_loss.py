"""Draws the loss curves of runs from their TensorBoard logs.

Example:
  tools/bazel run //experiments:plot_loss -- --runs=runs/quickstart/20260102-030405 --out=loss.svg
"""

import os
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from absl import app, flags
from tensorboard.backend.event_processing import event_accumulator

_RUNS = flags.DEFINE_list(
    "runs", None, "Run folders, each with an optional label: label=folder,..."
)
_OUT = flags.DEFINE_string("out", "loss.svg", "The picture to write: .svg, .png or .pdf.")
flags.mark_flag_as_required("runs")


def user_path(path: str) -> pathlib.Path:
    """A path relative to the folder that the command was given in (`bazel run` changes it)."""
    return pathlib.Path(os.environ.get("BUILD_WORKING_DIRECTORY", ".")) / path


def read_scalars(run: pathlib.Path, tag: str) -> tuple[list[int], list[float]]:
    """Steps and values of one TensorBoard scalar, in step order; empty if the run has none."""
    accumulator = event_accumulator.EventAccumulator(str(run), size_guidance={"scalars": 0})
    accumulator.Reload()
    if tag not in accumulator.Tags()["scalars"]:
        return [], []
    by_step = {e.step: e.value for e in accumulator.Scalars(tag)}  # a resumed run logs a step again
    return sorted(by_step), [by_step[step] for step in sorted(by_step)]


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for run in _RUNS.value:
        label, _, folder = run.rpartition("=")
        path = user_path(folder)
        steps, losses = read_scalars(path, "train/loss")
        if not steps:
            raise app.UsageError(f"{path} holds no TensorBoard log with the scalar train/loss")
        (line,) = axes.plot(steps, losses, linewidth=1, alpha=0.6, label=f"{label} train".strip())
        steps, losses = read_scalars(path, "val/loss")
        axes.plot(
            steps,
            losses,
            "o-",
            color=line.get_color(),
            markersize=3,
            label=f"{label} validation".strip(),
        )
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(user_path(_OUT.value), dpi=150)
    print(user_path(_OUT.value))


if __name__ == "__main__":
    app.run(main)
