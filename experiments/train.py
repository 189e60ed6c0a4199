"""Trains a model: flags and config here, everything else in flashtrain.train.

    tools/bazel run //experiments:train                                    the quickstart, on a CPU
    tools/bazel run //experiments:train -- --config=configs/gpt2s.py       GPT-2 small
    tools/bazel run //experiments:train -- --help                          the flags

Exit codes: see flashtrain/errors.
"""

import dataclasses
import sys
from pathlib import Path

from absl import flags

from experiments import command_line
from flashtrain.train import launcher
from flashtrain.train.config import OptimConfig, RunConfig, TrainerConfig
from flashtrain.train.run_folder import default_workdir

_DEFAULT_CONFIG = "configs/quickstart.py"


def defaults() -> dict[str, dict[str, object]]:
    """What a recipe may leave out."""
    from flashtrain.models.gpt import GPTConfig  # here: torch takes seconds, and --help needs none

    classes = {"model": GPTConfig, "optim": OptimConfig, "trainer": TrainerConfig}
    sections = {
        section: {
            field.name: field.default
            for field in dataclasses.fields(cls)
            if field.default is not dataclasses.MISSING
        }
        for section, cls in classes.items()
    }
    return sections | {"data": {"source": "", "path": "", "seed": 1111}}


def _define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string(
        "workdir",
        None,
        "the run's folder, runs/<config>/<time> by default; a run in it is continued",
        flag_values=values,
    )
    flags.DEFINE_bool("print_config", False, "print the whole config and exit", flag_values=values)
    flags.DEFINE_bool("help", False, "show this and exit", short_name="h", flag_values=values)
    return values


def main() -> int:
    """Parses, then trains in this process or launches one process per device."""
    command_line.enter_user_folder()
    values = _define_flags()
    if {"--help", "-h", "-help"} & set(sys.argv[1:]):
        print(command_line.help_text("train", values, _DEFAULT_CONFIG))
        return 0

    parsed = command_line.parse(sys.argv, _DEFAULT_CONFIG, values, defaults())
    if values.print_config:
        print(command_line.format_config(parsed.config))
        return 0
    config = RunConfig.from_mapping(parsed.name, parsed.config)
    workdir = Path(values.workdir).expanduser().absolute() if values.workdir else None
    processes = launcher.processes_to_start(config.trainer.device, config.trainer.devices)
    if processes > 1:
        workdir = workdir or default_workdir(config.name)  # one for all processes
        return launcher.launch(processes, [__file__, *sys.argv[1:], f"--workdir={workdir}"])

    from flashtrain.train.loop import train

    train(config, workdir, command=sys.argv)
    return 0


if __name__ == "__main__":
    sys.exit(launcher.run_main(main))
