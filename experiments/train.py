"""Trains a model: flags and config here, everything else in flashtrain.train.

    tools/bazel run //experiments:train                                    the quickstart, on a CPU
    tools/bazel run //experiments:train -- --config=configs/gpt2s.py       GPT-2 small
    tools/bazel run //experiments:train -- --help                          the flags

Exit codes: see flashtrain/errors.
"""

import sys

from flashtrain import environment

if __name__ == "__main__":
    environment.start()  # before the other imports, which take long

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from absl import flags

from experiments import command_line
from flashtrain.data.paths import user_path
from flashtrain.train import launcher
from flashtrain.train.config import OptimConfig, RunConfig, TrainerConfig
from flashtrain.train.console import answer
from flashtrain.train.run_folder import default_workdir, newest_workdir

_DEFAULT_CONFIG = "configs/quickstart.py"


def defaults(recipe: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the recipe may leave out, which depends on the family of its model."""
    from flashtrain.train import task  # here: torch takes seconds, and --help needs none

    family = recipe.get("model", {}).get("family", task.DEFAULT_FAMILY)
    model_config = task.task_class(family).config_class
    classes = {"model": model_config, "optim": OptimConfig, "trainer": TrainerConfig}
    sections = {
        section: {
            field.name: field.default
            for field in dataclasses.fields(cls)
            if field.default is not dataclasses.MISSING
        }
        for section, cls in classes.items()
    }
    sections["model"]["family"] = family
    data = {"source": "", "path": "", "batch_size": 0, "seed": 1111}
    if family == "gpt":
        data["document_mask"] = False
    return sections | {"data": data}


def _define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string(
        "workdir",
        None,
        "the run's folder, runs/<config>/<time> by default; a run in it is continued",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "resume",
        False,
        "continue the run in --workdir, or else the config's last one; an error if there is none",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "dry_run",
        False,
        "print parameters, operations, memory, tokens and hours of the run, and exit",
        flag_values=values,
    )
    flags.DEFINE_string(
        "profile",
        None,
        "profile steps into <workdir>/profile: a number of them, or first-last",
        flag_values=values,
    )
    flags.DEFINE_bool("print_config", False, "print the whole config and exit", flag_values=values)
    flags.DEFINE_bool("help", False, "show this and exit", short_name="h", flag_values=values)
    return values


def main() -> int:
    """Parses, then trains in this process or launches one process per device."""
    values = _define_flags()
    if {"--help", "-h", "-help"} & set(sys.argv[1:]):
        answer(command_line.help_text("train", values, _DEFAULT_CONFIG))
        return 0

    parsed = command_line.parse(sys.argv, _DEFAULT_CONFIG, values, defaults)
    if values.print_config:
        answer(command_line.format_config(parsed.config))
        return 0
    from flashtrain.train.profiler import parse_steps

    config = RunConfig.from_mapping(parsed.name, parsed.config)
    profile = parse_steps(values.profile) if values.profile else range(0)
    workdir = user_path(values.workdir) if values.workdir else None
    if values.resume and workdir is None:
        workdir = newest_workdir(config.name)
    processes = launcher.processes_to_start(config.trainer.device, config.trainer.devices)
    if values.dry_run:
        return _dry_run(config, processes)
    if processes > 1:
        workdir = workdir or default_workdir(config.name)  # one for all processes
        return launcher.launch(processes, [__file__, *sys.argv[1:], f"--workdir={workdir}"])

    from flashtrain.train.loop import train

    train(config, workdir, command=sys.argv, resume=values.resume, profile=profile)
    return 0


def _dry_run(config: RunConfig, processes: int) -> int:
    """Prints what the run would take; the last line is JSON."""
    import torch

    from flashtrain import distributed
    from flashtrain.train import estimate, meters

    launched = environment.ranks()
    ranks = launched.size if launched else processes
    device = torch.device(distributed.resolve_device(config.trainer.device))
    memory = estimate.memory_of(device, processes)
    found = estimate.estimate(config, ranks, memory, meters.peak_flops(device))
    answer(found.text())
    answer(json.dumps(found.to_dict()))
    return 0


if __name__ == "__main__":
    sys.exit(launcher.run_main(main))
