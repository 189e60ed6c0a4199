"""State dicts of other libraries: reading their files, and telling how they differ from ours."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flashtrain.errors import UserError
from flashtrain.files import cause, check_regular, inside

_SHOWN_NAMES = 8  # of each kind of mismatch; the rest is counted
_MAX_JSON_BYTES = 256 << 20  # the indices of the largest models have a few
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, or of a folder in Hugging Face's layout, in one file or in shards.

    The files are mapped: memory is used as tensors are read.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    for file in _files(path) if path.is_dir() else [path]:
        found = _read_file(file)
        if twice := sorted(tensors.keys() & found.keys()):
            raise UserError(f"{file} holds {_shown(twice)}, which another of its shards holds, too")
        tensors |= found
    return tensors


def _files(folder: Path) -> list[Path]:
    """A folder's file of weights, which as in transformers goes before shards, or its shards."""
    if (folder / _SINGLE).exists() or not (folder / _INDEX).exists():
        return [folder / _SINGLE]
    names = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{folder / _INDEX} has no weight_map, the object of names and their files")
    files = []
    for name in dict.fromkeys(map(str, names.values())):
        try:
            files.append(inside(folder, name))
        except FileNotFoundError as error:
            raise UserError(f"{folder / name} does not exist, but {_INDEX} lists it") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / _INDEX}: {_reason(error)}") from error
    return files


def _read_file(file: Path) -> dict[str, Tensor]:
    if not file.exists():
        raise UserError(
            f"{file} does not exist; weights are read from {_SINGLE}, or from the shards that "
            f"{_INDEX} lists (other formats may run code when they are loaded: convert them "
            "with transformers' save_pretrained)"
        )
    try:
        check_regular(file)
        return load_file(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {_reason(error)}") from error
    except (SafetensorError, LookupError, AttributeError, RuntimeError, TypeError) as error:
        raise UserError(
            f"{file} is no whole safetensors file ({_reason(error)}); fetch it again"
        ) from error


def _reason(error: Exception) -> str:
    """An error in one line."""
    return " ".join((cause(error) if isinstance(error, OSError) else str(error)).split())[:200]


def read_json(path: Path) -> dict:
    """A JSON object, also after a byte order mark. Raises UserError where the file is none."""
    try:
        check_regular(path)
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {_MAX_JSON_BYTES >> 20} MiB")
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}") from error
    except RecursionError as error:
        raise UserError(f"{path} cannot be read: its JSON is nested too deep") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value


def check_names_and_shapes(
    source: str, found: Mapping[str, Tensor], expected: Mapping[str, torch.Size]
) -> None:
    """Compares a state dict to what a model needs.

    Raises:
        ValueError: names what is missing, unexpected, misshapen or of another kind of numbers, all
            in one message.
    """
    misshapen = [
        f"{name} is {list(found[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    others = [
        f"{name} is {found[name].dtype}"
        for name in expected
        if name in found and found[name].dtype not in _DTYPES
    ]
    complaints = [
        f"{kind}: {_shown(names)}"
        for kind, names in (
            ("missing", sorted(expected.keys() - found.keys())),
            ("unexpected", sorted(found.keys() - expected.keys())),
            ("misshapen", misshapen),
            ("no floating-point numbers of 16 bits or more", others),
        )
        if names
    ]
    if complaints:
        raise ValueError(f"{source} does not fit the model; {'; '.join(complaints)}")


def _shown(names: list[str]) -> str:
    more = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


@torch.no_grad()
def copy_into(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors into the parameters of the same names, in the parameters' dtypes."""
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)
