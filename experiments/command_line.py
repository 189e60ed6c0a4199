"""The command line of the programs here: a recipe, changes to its keys, and a few flags.

    --config=configs/gpt3l.py:8k --config.trainer.max_steps=20

A recipe is a Python file with `get_config(arg)` that returns a ConfigDict of the sections model,
data, optim and trainer. Keys that it leaves out have the defaults of `flashtrain`'s own config
classes. Every mistake is a UserError of one line.
"""

import contextlib
import dataclasses
import importlib.util
import numbers
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from flashtrain import files
from flashtrain.data.paths import user_path
from flashtrain.errors import UserError, did_you_mean
from flashtrain.errors.ranges import shown

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
    known = ", ".join(f"configs/{path.name}" for path in recipes())
    rows = [
        ("--config=<file>[:<variant>]", f"the recipe (default: {default_config})"),
        ("--config.<section>.<key>=<value>", "change one key of it; --print_config shows them all"),
        *flag_lines(values),
    ]
    lines = [f"  {flag:<34} {text}" for flag, text in rows]
    return "\n".join([f"usage: {program} [flags]", "", *lines, "", f"recipes: {known}"])


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
    parts = recipe.split(":")  # a path may hold colons too
    for count in range(len(parts), 0, -1):
        name, argument = ":".join(parts[:count]), ":".join(parts[count:])
        for place in (user_path, _EXPERIMENTS.joinpath, (_EXPERIMENTS / "configs").joinpath):
            for suffix in ("", ".py"):
                path = place(name + suffix)
                if path.suffix == ".py" and _is_there(path):
                    return path, argument if count < len(parts) else None
    known = {f"configs/{path.name}": path for path in recipes()}
    by_stem = {path.stem: name for name, path in known.items()}
    stem = Path(parts[0]).name.removesuffix(".py")
    suggestion = did_you_mean(stem, by_stem)
    for near, name in by_stem.items():
        suggestion = suggestion.replace(f"'{near}'", f"'{name}'")
    raise UserError(f"there is no config file {parts[0]!r}; {suggestion}")


def _is_there(path: Path) -> bool:
    """Whether there is a file. Raises UserError where it is a pipe or a device, or unreachable."""
    try:
        files.check_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {files.cause(error)}") from error
    except ValueError as error:
        raise UserError(f"config file {path} cannot be read: {error}") from error
    return True


def _load(path: Path, argument: str | None) -> dict[str, dict[str, Any]]:
    """The sections that the recipe's get_config returns."""
    root = str(_EXPERIMENTS.parent)
    if root not in sys.path:
        sys.path.append(root)  # recipes share code as experiments.configs.<module>
    spec = importlib.util.spec_from_file_location("recipe", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _errors_of(path):
        spec.loader.exec_module(module)
    if not callable(getattr(module, "get_config", None)):
        known = ", ".join(f"configs/{p.name}" for p in recipes())
        raise UserError(f"config file {path} has no function get_config; recipes: {known}")
    with _errors_of(path):
        try:
            config = module.get_config() if argument is None else module.get_config(argument)
        except ValueError as error:  # what a recipe has to say about its argument
            raise UserError(str(error)) from error
        return _sections(path, config)


@contextlib.contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Around a recipe's own code: whatever it raises is one line with its place."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        name = f"{error.filename}: " if error.filename not in (None, str(path)) else ""
        raise UserError(f"config file {path} cannot be read: {name}{files.cause(error)}") from error
    except SyntaxError as error:
        raise UserError(f"config file {path} cannot be read: {error}") from error
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        place = f", line {lines[-1]}" if lines else ""
        raise UserError(
            f"config file {path}{place} failed: {type(error).__name__}: {error!s:.300}"
        ) from error


def _sections(path: Path, config: Any) -> dict[str, dict[str, Any]]:
    """What a recipe gives, as plain data."""
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise UserError(
            f"config file {path}: get_config must return a ConfigDict, got {shown(config)}"
        )
    sections: dict[str, dict[str, Any]] = {}
    for name, section in config.items():
        if isinstance(section, ml_collections.ConfigDict):
            section = section.to_dict()
        keys = list(section) if isinstance(section, Mapping) else [None]
        if not all(isinstance(key, str) and key.isidentifier() for key in keys):
            raise UserError(
                f"config file {path}: section {name!r} must be a ConfigDict of keys, got "
                f"{shown(section)}"
            )
        sections[name] = {k: _plain(path, f"{name}.{k}", v) for k, v in section.items()}
    return sections


def _plain(path: Path, key: str, value: Any) -> Any:
    """A value as Python's own type: what numpy makes of a number is one too."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, (tuple, list)):
        return tuple(_plain(path, key, v) for v in value)
    raise UserError(
        f"config file {path}: {key} must be a number, text, true or false, or a tuple of these, "
        f"got {type(value).__name__}"
    )


def _with_defaults(
    recipe: Mapping[str, Mapping[str, Any]], defaults: Mapping[str, Mapping[str, Any]], path: Path
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
                with contextlib.suppress(OverflowError):  # its range is checked with all others
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
    return f"--{name}={value:.80} is not {takes}; use one such as --{name}={example}"
