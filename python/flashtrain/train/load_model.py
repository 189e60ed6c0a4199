"""Trained models by their path, whatever has written them."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from flashtrain.data import DataError, Tokenizer, get_tokenizer
from flashtrain.errors import UserError, did_you_mean
from flashtrain.models.gpt import GPT, GPTConfig
from flashtrain.models.hf_gpt2 import from_hf
from flashtrain.train import checkpoint
from flashtrain.train.console import say

_GPT2_VOCAB_SIZE = 50257


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A GPT, in evaluation mode, with what is known of it.

    Attributes:
        tokenizer: of the text that it was trained on.
        config: of its run, as in the manifest of a checkpoint; None if no run of ours made it.
    """

    model: GPT
    tokenizer: Tokenizer
    config: dict[str, Any] | None


def load_model(path: Path, device: torch.device, *, ema: bool = False) -> LoadedModel:
    """Loads a GPT.

    Args:
        path: a run's folder, of which the newest whole checkpoint is taken; one checkpoint; or a
            folder of Hugging Face's GPT-2.
        device: where the weights go.
        ema: take the moving average of the weights.

    Raises:
        UserError: nothing usable is there, or it is no GPT.
    """
    if (path / "checkpoints").is_dir():
        found = checkpoint.newest(path / "checkpoints", warn=say)
        if found is None:
            raise UserError(f"{path / 'checkpoints'} holds no checkpoint yet")
        loaded = _from_checkpoint(found, ema)
    elif (path / checkpoint.MANIFEST).is_file():
        loaded = _from_checkpoint(checkpoint.read(path), ema)
    elif (path / "config.json").is_file():
        if ema:
            raise UserError(f"{path} is a folder of Hugging Face's, which holds no moving average")
        loaded = _from_hf_folder(path)
    else:
        raise UserError(
            f"{path} holds no model: it has neither checkpoints/ (a run), nor "
            f"{checkpoint.MANIFEST} (a checkpoint), nor config.json (Hugging Face's GPT-2)"
        )
    loaded.model.to(device).eval()
    return loaded


def _from_checkpoint(found: checkpoint.Checkpoint, ema: bool) -> LoadedModel:
    config, data = found.manifest["config"], found.manifest["data"]
    options: dict[str, Any] = dict(config["model"])
    family = options.pop("family", "gpt")
    if family != "gpt":
        raise UserError(f"{found.path} is a model of the family {family!r}; needed is a gpt")
    # Left open, they follow the data.
    options["vocab_size"] = options.get("vocab_size") or data["vocab_size"]
    options["max_seq_len"] = options.get("max_seq_len") or config["data"]["seq_len"]
    known = [field.name for field in dataclasses.fields(GPTConfig)]
    for key in options:
        if key not in known:
            raise UserError(
                f"{found.path} was saved with model.{key}, which this version does not have; "
                + did_you_mean(key, known)
            )
    model = GPT(GPTConfig(**options))
    if ema and not config["trainer"].get("ema_decay"):
        raise UserError(f"{found.path} holds no moving average: trainer.ema_decay was 0")
    checkpoint.load_weights(found, model, ema=ema)
    return LoadedModel(model, _tokenizer(data["tokenizer"]), config)


def _from_hf_folder(path: Path) -> LoadedModel:
    model = from_hf(path)
    if model.config.vocab_size != _GPT2_VOCAB_SIZE:
        raise UserError(
            f"{path} has a vocabulary of {model.config.vocab_size} tokens; the tokenizer at hand "
            f"is GPT-2's, of {_GPT2_VOCAB_SIZE}"
        )
    return LoadedModel(model, _tokenizer("gpt2"), None)


def _tokenizer(name: str) -> Tokenizer:
    try:
        return get_tokenizer(name)
    except DataError as error:
        raise UserError(str(error)) from error
