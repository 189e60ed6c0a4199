"""From a run's config to its dataset and GPT, with errors that name config keys."""

import dataclasses
import inspect
from typing import Any

from flashtrain.data import DataError, TokenDataset, load_dataset
from flashtrain.errors import UserError, did_you_mean
from flashtrain.models.gpt import GPT, GPTConfig
from flashtrain.train.config import RunConfig


def build_dataset(config: RunConfig) -> TokenDataset:
    """Loads the data; if it is missing, one rank prepares it and the others wait."""
    options = {key: value for key, value in config.data.items() if key != "batch_size"}
    known = list(inspect.signature(load_dataset).parameters)
    for key in options:
        if key not in known:
            raise UserError(f"config key data.{key} does not exist; {did_you_mean(key, known)}")
    try:
        return load_dataset(**options)
    except DataError as error:
        raise UserError(str(error)) from error


def build_gpt(config: RunConfig) -> GPT:
    """A model on the CPU, in fp32, with freshly drawn weights.

    The data is read only for its vocabulary, if the config does not give one.
    """
    vocab_size = config.model.get("vocab_size") or build_dataset(config).vocab_size
    return _build_gpt(config, vocab_size)


def build_model(config: RunConfig, dataset: TokenDataset) -> GPT:
    """The same model, which must fit the data."""
    vocab_size = config.model.get("vocab_size") or dataset.vocab_size
    model = _build_gpt(config, vocab_size)
    if vocab_size < dataset.vocab_size:
        raise UserError(
            f"model.vocab_size={vocab_size} is smaller than the data's vocabulary of "
            f"{dataset.vocab_size} tokens; leave it 0 to follow the data"
        )
    return model


def _build_gpt(config: RunConfig, vocab_size: int) -> GPT:
    options: dict[str, Any] = {k: v for k, v in config.model.items() if k != "family"}
    options["vocab_size"] = vocab_size
    options["max_seq_len"] = options.get("max_seq_len") or config.data["seq_len"]
    known = [field.name for field in dataclasses.fields(GPTConfig)]
    for key in options:
        if key not in known:
            raise UserError(f"config key model.{key} does not exist; {did_you_mean(key, known)}")
    if config.data["seq_len"] > options["max_seq_len"]:
        raise UserError(
            f"data.seq_len={config.data['seq_len']} is longer than model.max_seq_len="
            f"{options['max_seq_len']}; lower the one or raise the other"
        )
    try:
        return GPT(GPTConfig(**options))
    except (TypeError, ValueError) as error:
        raise UserError(f"config section model: {error}") from error
