"""What the configs of all models check, with errors that name the key, its value and what is valid.

The upper bounds are far beyond any machine; they keep absurd values from hanging or crashing it.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from flashtrain.errors import did_you_mean
from flashtrain.errors.ranges import Range, problem, shown

LAYERS = Range(1, 10_000)
_MOST_PARAMETERS = 10**12


def check_fields(config: Any, ranges: Mapping[str, Range]) -> None:
    """Each field of a dataclass is of the type that it is annotated with, and in its range."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        kind: Any = field.type
        if wrong := problem(value, kind, ranges.get(field.name)):
            raise ValueError(f"model.{field.name}={shown(value)} must {wrong}")


def check_multiple(config: Any, name: str, of: str) -> None:
    """One field is a multiple of another."""
    if getattr(config, name) % getattr(config, of):
        raise ValueError(
            f"model.{name}={getattr(config, name)} is not a multiple of"
            f" model.{of}={getattr(config, of)}"
        )


def check_choice(config: Any, name: str, valid: Iterable[str]) -> None:
    """A field is one of some words."""
    value = getattr(config, name)
    if value not in (valid := tuple(valid)):
        raise ValueError(f"model.{name}={shown(value)} is unknown; {did_you_mean(value, valid)}")


def check_parameters(config: Any, count: int, names: Iterable[str]) -> None:
    """A model has no absurd number of parameters, which come from the fields `names`."""
    if count > _MOST_PARAMETERS:
        sizes = ", ".join(f"model.{name}={getattr(config, name)}" for name in names)
        raise ValueError(
            f"{sizes} make {count:.3g} parameters; supported: at most {_MOST_PARAMETERS:.0e}"
        )
