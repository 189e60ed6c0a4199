"""The command line of the programs here: a recipe, changes to its keys, and a few flags.

    --config=configs/gpt3l.py:8k --config.trainer.max_steps=20

A recipe is a Python file with `get_config(arg)` that returns a ConfigDict of the sections model,
data, optim and trainer. Keys that it leaves out have the defaults of `flashtrain`'s own config
classes. Every mistake is a UserError of one line.
"""

import dataclasses
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from flashtrain.errors import UserError, did_you_mean

_EXPERIMENTS = Path(__file__).absolute().parent
_FLAG = "--config"
_TYPE_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    tuple: "a tuple of numbers",
}


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """A parsed command line."""

    name: str  # of the recipe and its variant: gpt3l-8k
    config: dict[str, dict[str, Any]]  # sections of plain values
    values: flags.FlagValues  # the program's own flags


def enter_user_folder() -> None:
    """Relative paths mean the user's folder, also where `bazel run` has started us elsewhere."""
    folder = os.environ.get("BUILD_WORKING_DIRECTORY")
    if folder:
        os.chdir(folder)


def parse(
    argv: Sequence[str],
    default_config: str,
    values: flags.FlagValues,
    defaults: Callable[[Mapping[str, Any]], Mapping[str, Mapping[str, Any]]],
) -> CommandLine:
    """Reads the recipe and applies the changes.

    Args:
        argv: the program's name and its arguments.
        default_config: the recipe where --config is not given.
        values: holds the definitions of the program's other flags; parsed here.
        defaults: gives the sections of default values for a recipe's sections.

    Raises:
        UserError: a flag, file, variant, key or value is wrong; names the nearest right one.
    """
    recipe, rest = _split_off_recipe(argv, default_config)
    path, argument = _find(recipe)
    sections = _load(path, argument)
    config = _with_defaults(sections, defaults(sections), path)
    _check_overrides(rest, config)
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=list(rest))
    parse_flags(rest, values, config)
    name = path.stem + (f"-{argument}" if argument else "").replace(",", "-")
    return CommandLine(name, config.to_dict(), values)


def parse_flags(argv: Sequence[str], values: flags.FlagValues, config: Any = None) -> None:
    """Reads flags into `values`, which define them.

    Args:
        argv: the program's name and its arguments.
        values: definitions; takes the values.
        config: the recipe whose keys are among the flags, if there is one.

    Raises:
        UserError: a flag or value is wrong; names the nearest right one.
    """
    try:
        positional = values(list(argv))
    except flags.UnrecognizedFlagError as error:
        known = [f"--{name}" for name in values if not name.startswith("config.")]
        flag = f"--{error.flagname}"
        raise UserError(f"there is no flag {flag}; {did_you_mean(flag, known)}") from None
    except (flags.Error, ValueError, TypeError) as error:
        raise UserError(_explain_value(str(error), values, config)) from None
    if len(positional) > 1:
        raise UserError(
            f"unexpected argument {positional[1]!r}: flags are --name=value; --help shows them"
        )


def flag_lines(values: flags.FlagValues) -> list[tuple[str, str]]:
    """Each flag as it is given, and its help."""
    return [
        (f"--{name}" if values[name].boolean else f"--{name}=<value>", values[name].help)
        for name in values
        if name == values[name].name  # not a short name
    ]


def help_text(program: str, values: flags.FlagValues, default_config: str) -> str:
    """The flags of a program, shortly."""
    shown = ", ".join(f"configs/{path.name}" for path in recipes())
    rows = [
        ("--config=<file>[:<variant>]", f"the recipe (default: {default_config})"),
        ("--config.<section>.<key>=<value>", "change one key of it; --print_config shows them all"),
        *flag_lines(values),
    ]
    lines = [f"  {flag:<34} {text}" for flag, text in rows]
    return "\n".join([f"usage: {program} [flags]", "", *lines, "", f"recipes: {shown}"])


def recipes() -> list[Path]:
    """The recipes that come with this package."""
    files = sorted((_EXPERIMENTS / "configs").glob("*.py"))
    return [path for path in files if "\ndef get_config(" in path.read_text(encoding="utf-8")]


def format_config(config: Mapping[str, Mapping[str, Any]]) -> str:
    """Every key as the flag that sets it."""
    return "\n".join(
        f"{_FLAG}.{section}.{key}={value!r}"
        for section, values in config.items()
        for key, value in values.items()
    )


def _split_off_recipe(argv: Sequence[str], default: str) -> tuple[str, list[str]]:
    """(the last --config's value, the other arguments)."""
    recipe, rest, arguments = default, [], list(argv)
    while arguments:
        argument = arguments.pop(0)
        name, equals, value = argument.partition("=")
        if name not in (_FLAG, _FLAG[1:]):
            rest.append(argument)
        elif equals:
            recipe = value
        elif arguments and not arguments[0].startswith("-"):
            recipe = arguments.pop(0)
        else:
            raise UserError(f"{_FLAG} needs a value, as in {_FLAG}={default}")
    return recipe, rest


def _find(recipe: str) -> tuple[Path, str | None]:
    """The file and the argument of `file[.py][:argument]`, relative to here or to this package."""
    name, colon, argument = recipe.partition(":")
    for folder in (Path.cwd(), _EXPERIMENTS, _EXPERIMENTS / "configs"):
        for suffix in ("", ".py"):
            path = folder / Path(name + suffix).expanduser()
            if path.suffix == ".py" and path.is_file():
                return path, argument if colon else None
    known = {f"configs/{path.name}": path for path in recipes()}
    by_stem = {path.stem: shown for shown, path in known.items()}
    stem = Path(name).name.removesuffix(".py")
    suggestion = did_you_mean(stem, by_stem)
    for near, shown in by_stem.items():
        suggestion = suggestion.replace(f"'{near}'", f"'{shown}'")
    raise UserError(f"there is no config file {name!r}; {suggestion}")


def _load(path: Path, argument: str | None) -> Mapping[str, Any]:
    """What the recipe's get_config returns."""
    root = str(_EXPERIMENTS.parent)
    if root not in sys.path:
        sys.path.append(root)  # recipes share code as experiments.configs.<module>
    spec = importlib.util.spec_from_file_location("recipe", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (OSError, SyntaxError) as error:
        raise UserError(f"config file {path} cannot be read: {error}") from error
    if not hasattr(module, "get_config"):
        shown = ", ".join(f"configs/{p.name}" for p in recipes())
        raise UserError(f"config file {path} has no function get_config; recipes: {shown}")
    try:
        return module.get_config() if argument is None else module.get_config(argument)
    except ValueError as error:
        raise UserError(str(error)) from error


def _with_defaults(
    recipe: Mapping[str, Any], defaults: Mapping[str, Mapping[str, Any]], path: Path
) -> ml_collections.ConfigDict:
    """The recipe's sections, completed; an int in the place of a float becomes one."""
    sections: dict[str, dict[str, Any]] = {}
    for section in recipe:
        if section not in defaults:
            raise UserError(
                f"{path} has a section {section!r} that does not exist; "
                + did_you_mean(section, defaults)
            )
    for section, default in defaults.items():
        given = dict(recipe.get(section, {}))
        for key, value in default.items():
            if isinstance(value, float) and type(given.get(key)) is int:
                given[key] = float(given[key])
        sections[section] = {**default, **given}
    return ml_collections.ConfigDict(sections)


def _check_overrides(arguments: Sequence[str], config: ml_collections.ConfigDict) -> None:
    keys = [f"{section}.{key}" for section in config for key in config[section]]
    for argument in arguments:
        flag = argument.split("=", 1)[0].lstrip("-")
        if not argument.startswith("-") or not flag.startswith(("config.", "noconfig.")):
            continue
        key = flag.split(".", 1)[1]
        if key in config:
            own = next(k for k in keys if k.startswith(f"{key}."))
            raise UserError(f"config.{key} is a section; set its keys, as in --config.{own}=...")
        if key not in keys:
            raise UserError(f"there is no config key {key!r}; {did_you_mean(key, keys)}")


def _explain_value(message: str, values: flags.FlagValues, config: Any) -> str:
    """Turns absl's "flag --name=value: reason" into what the flag takes; else gives the message."""
    match = re.match(r"flag --([\w.]+)=(.*?): ", message)
    if match is None:
        return message
    name, value = match.groups()
    if name.startswith("config."):
        section, key = name.removeprefix("config.").split(".")
        old = config[section][key]
        takes, example = _TYPE_NAMES.get(type(old), type(old).__name__), repr(old)
    else:
        takes, example = _TYPE_NAMES[bool] if values[name].boolean else "text", "true"
    return f"--{name}={value} is not {takes}; use one such as --{name}={example}"
