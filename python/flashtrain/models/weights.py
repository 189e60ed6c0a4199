"""State dicts of other libraries: reading their files, and telling how they differ from ours."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from flashtrain.errors import UserError

_SHOWN_NAMES = 8  # of each kind of mismatch; the rest is counted
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, or of a folder in Hugging Face's layout, in one file or in shards.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    files = [path]
    if path.is_dir():
        files = [path / _SINGLE]
        if (path / _INDEX).is_file():
            index = read_json(path / _INDEX)
            files = sorted({path / name for name in index.get("weight_map", {}).values()})
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise UserError(
                f"{file} does not exist; weights are read from {_SINGLE}, or from the shards that "
                f"{_INDEX} lists (other formats may run code when they are loaded: convert them "
                "with transformers' save_pretrained)"
            )
        try:
            tensors.update(load_file(file))
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file} is no whole safetensors file ({error}); fetch it again"
            ) from error
    return tensors


def read_json(path: Path) -> dict:
    """A JSON object. Raises UserError where the file is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value


def check_names_and_shapes(
    source: str, found: Mapping[str, Tensor], expected: Mapping[str, torch.Size]
) -> None:
    """Compares a state dict to what a model needs.

    Raises:
        ValueError: names what is missing, unexpected or misshapen, all in one message.
    """
    misshapen = [
        f"{name} is {list(found[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    complaints = [
        f"{kind}: {_shown(names)}"
        for kind, names in (
            ("missing", sorted(expected.keys() - found.keys())),
            ("unexpected", sorted(found.keys() - expected.keys())),
            ("misshapen", misshapen),
        )
        if names
    ]
    if complaints:
        raise ValueError(f"{source} does not fit the model; {'; '.join(complaints)}")


def _shown(names: list[str]) -> str:
    more = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


@torch.no_grad()
def copy_into(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors into the parameters of the same names, in the parameters' dtypes."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)
