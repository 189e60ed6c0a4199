"""Loads trained models by their path, from any program that has written them."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from flashtrain import files
from flashtrain.data import DataError, Tokenizer, get_tokenizer
from flashtrain.errors import UserError, did_you_mean
from flashtrain.models.gpt import GPT, GPTConfig
from flashtrain.models.hf_gpt2 import from_hf
from flashtrain.train import checkpoint, manifest
from flashtrain.train.console import say

_GPT2_VOCAB_SIZE = 50257


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A GPT, in evaluation mode, with its tokenizer and config.

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
        path: a run's folder or its folder of checkpoints, whose newest whole checkpoint is used;
            one checkpoint of any name; or a folder of Hugging Face's GPT-2.
        device: of the weights.
        ema: use the moving average of the weights.

    Raises:
        UserError: nothing usable is there, or it is no GPT.
    """
    try:
        loaded = _load(path, ema)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path}: {files.cause(error)}") from error
    loaded.model.to(device).eval()
    return loaded


def _load(path: Path, ema: bool) -> LoadedModel:
    if not path.is_dir():
        raise UserError(f"{path} holds no model: {_not_a_folder(path)}")
    for run in (path / "checkpoints", path):
        if checkpoint.paths(run):
            found = checkpoint.newest(run, warn=say)
            if found is not None:
                return _from_checkpoint(found, ema)
    if (path / manifest.NAME).exists():
        return _from_checkpoint(checkpoint.read(path), ema)
    if (path / "config.json").exists():
        if ema:
            raise UserError(f"{path} is a folder of Hugging Face's, which holds no moving average")
        return _from_hf_folder(path)
    if (path / "checkpoints").is_dir():
        raise UserError(f"{path / 'checkpoints'} holds no checkpoint yet")
    raise UserError(
        f"{path} holds no model: it has neither checkpoints (a run, or its folder of them), nor "
        f"{manifest.NAME} (a checkpoint), nor config.json (Hugging Face's GPT-2)"
    )


def _not_a_folder(path: Path) -> str:
    if path.exists():
        return "it is a file; give its folder"
    return "it is a link to nothing" if path.is_symlink() else "there is no such folder"


def _from_checkpoint(found: checkpoint.Checkpoint, ema: bool) -> LoadedModel:
    config, data = found.section("config"), found.section("data")
    try:
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
        if ema and not config["trainer"].get("ema_decay"):
            raise UserError(f"{found.path} holds no moving average: trainer.ema_decay was 0")
        model = _with_weights(found, GPTConfig(**options), ema)
        return LoadedModel(model, _tokenizer(data["tokenizer"]), config)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if isinstance(error, UserError):
            raise
        reason = f"its config makes no model: {type(error).__name__}: {error}"
        raise found.unusable(reason) from error


def _with_weights(found: checkpoint.Checkpoint, config: GPTConfig, ema: bool) -> GPT:
    """Makes the model only once the saved weights are known to fit: a config may say anything."""
    reader = checkpoint.Reader(found)
    if config.num_layers > len(reader.names("model.")):
        raise ValueError(f"num_layers={config.num_layers}, but it holds fewer tensors")
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in GPT(config).named_parameters()}
    checkpoint.check_fits(found, reader, shapes, "ema." if ema else "model.")
    model = GPT(config)
    checkpoint.load_weights(found, model, ema=ema)
    return model


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
