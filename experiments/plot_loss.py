"""Draws the loss curves of runs.

    tools/bazel run //experiments:plot_loss -- --runs=runs/quickstart/20260102-030405 --out=loss.svg
    tools/bazel run //experiments:plot_loss -- --runs=small=runs/a,large=runs/b

A folder whose name holds commas or "=" is taken as it is; --runs may be given repeatedly.
Exit codes: see flashtrain/errors.
"""

from flashtrain import environment

if __name__ == "__main__":
    environment.start("interrupted")  # before the other imports, which take long

import json
import sys
from pathlib import Path
from typing import Any

from absl import flags

from experiments import command_line
from flashtrain import files
from flashtrain.errors import UserError
from flashtrain.train import launcher
from flashtrain.train.console import answer

_METRICS = "metrics.jsonl"


def _define_flags() -> flags.FlagValues:
    values = flags.FlagValues()

    def define(function: Any, name: str, default: Any, text: str) -> None:
        function(name, default, text, flag_values=values)

    define(flags.DEFINE_multi_string, "runs", [], "run folders: [label=]folder,...")
    define(flags.DEFINE_string, "out", "loss.svg", "the picture to write: .svg, .png or .pdf")
    define(flags.DEFINE_bool, "help", False, "show this and exit")
    return values


def main() -> int:
    """Parses, reads and draws."""
    values = _define_flags()
    if {"--help", "-h", "-help"} & set(sys.argv[1:]):
        lines = [f"  {flag:<16} {text}" for flag, text in command_line.flag_lines(values)]
        answer("\n".join(["usage: plot_loss [flags]", "", *lines]))
        return 0
    command_line.parse_flags(sys.argv, values)
    runs = [run for value in values.runs for run in parse_runs(value)]
    if not runs:
        raise UserError("--runs=[label=]<folder>,... names the runs to draw")
    curves = [(label, read_metrics(folder)) for label, folder in runs]
    out = Path(values.out)
    try:
        draw(curves, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {files.cause(error)}") from error
    except ValueError as error:  # matplotlib does not know the file's ending
        raise UserError(f"cannot write {out}: {error}") from error
    answer(str(out.absolute()))
    return 0


def parse_runs(value: str) -> list[tuple[str, Path]]:
    """(label, folder) of each run in a value of --runs. Raises UserError where one is no run."""
    found = []
    while value:
        pieces = value.split(",")
        for count in range(1, len(pieces) + 1):  # the shortest that is a run
            if run := _labelled(",".join(pieces[:count])):
                break
        else:
            folder = pieces[0].partition("=")[2] or pieces[0]
            raise UserError(f"{folder} is no run folder: it has no {_METRICS}")
        found.append(run)
        value = ",".join(pieces[count:])
    return found


def _labelled(text: str) -> tuple[str, Path] | None:
    """A run's folder, or a label, "=" and the folder; None: it is neither."""
    places = [place for place, character in enumerate(text) if character == "="]
    for label, folder in (("", text), *((text[:place], text[place + 1 :]) for place in places)):
        try:
            files.check_regular(Path(folder, _METRICS))
        except (OSError, ValueError):
            continue
        return label, Path(folder)
    return None


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The entries of a run's metrics, without a line that is being written. Raises UserError."""
    path, entries = run / _METRICS, []
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {files.cause(error)}") from error
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break
        try:
            entry = json.loads(line)
            int(entry["step"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number} is no entry of a run's metrics: {error!r:.80}"
            ) from error
        entries.append(entry)
    return entries


def draw(runs: list[tuple[str, list[dict[str, Any]]]], out: Path) -> None:
    """One training curve and one validation curve for each (label, metrics)."""
    import matplotlib  # here: it takes long, and a mistake is told before

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "flashtrain"  # the same picture has the same bytes
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for label, entries in runs:
        # No formulas, and nothing that is no text.
        label = label.replace("$", r"\$").encode("utf-8", "backslashreplace").decode()
        train = axes.plot(
            *_scalar(entries, "train/loss"), linewidth=1, alpha=0.6, label=f"{label} train".strip()
        )
        axes.plot(
            *_scalar(entries, "val/loss"),
            "o-",
            color=train[0].get_color(),
            markersize=4,
            label=f"{label} validation".strip(),
        )
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(out, dpi=150, metadata={"Date": None} if out.suffix == ".svg" else None)


def _scalar(entries: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a scalar, without those that were not finite."""
    found = [entry for entry in entries if isinstance(entry.get(name), (int, float))]
    return [entry["step"] for entry in found], [entry[name] for entry in found]


if __name__ == "__main__":
    sys.exit(launcher.run_main(main))
