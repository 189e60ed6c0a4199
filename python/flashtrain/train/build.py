"""From a run's config to its dataset, model and batch sizes, with errors that name config keys."""

import dataclasses
from typing import Any

from flashtrain.data import DataError, TokenDataset, load_dataset
from flashtrain.distributed import World
from flashtrain.errors import UserError, did_you_mean
from flashtrain.models.gpt import GPT, GPTConfig
from flashtrain.train.config import RunConfig


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """How a global batch is cut: global = micro * accumulation * ranks, in sequences."""

    micro: int
    accumulation: int


def batch_sizes(config: RunConfig, ranks: int) -> BatchSizes:
    """Splits the global batch, which never changes with the hardware.

    `data.batch_size` is the largest micro batch: it shrinks where a rank's share is smaller.

    Raises:
        UserError: the global batch cannot be split evenly; names the nearest ones that can.
    """
    total, micro = config.trainer.global_batch_size, config.data["batch_size"]
    if total % ranks:
        raise UserError(
            f"trainer.global_batch_size={total} cannot be shared evenly by {ranks} processes; the "
            f"nearest that can: {_nearest_multiples(total, ranks)}"
        )
    share = total // ranks
    micro = min(micro, share)
    if share % micro:
        divisors = [n for n in range(1, share + 1) if share % n == 0]
        below, above = max(n for n in divisors if n < micro), min(n for n in divisors if n > micro)
        raise UserError(
            f"trainer.global_batch_size={total} on {ranks} processes cannot be cut into micro "
            f"batches of data.batch_size={micro}; the nearest data.batch_size that fit: {below} or "
            f"{above}; the nearest trainer.global_batch_size: "
            f"{_nearest_multiples(total, micro * ranks)}"
        )
    return BatchSizes(micro, share // micro)


def _nearest_multiples(number: int, of: int) -> str:
    below, above = number // of * of, (number // of + 1) * of
    return f"{below} or {above}" if below else f"{above}"


def build_dataset(config: RunConfig, world: World) -> TokenDataset:
    """Loads the data; rank 0 first, so that what is missing is prepared once."""
    options = {key: value for key, value in config.data.items() if key != "batch_size"}
    if not world.is_main:
        world.barrier()
    try:
        dataset = load_dataset(**options)
    except DataError as error:
        raise UserError(str(error)) from error
    if world.is_main:
        world.barrier()
    return dataset


def build_model(config: RunConfig, dataset: TokenDataset) -> GPT:
    """A model on the CPU, in fp32, with freshly drawn weights."""
    options: dict[str, Any] = dict(config.model)
    # Left open, they follow the data.
    options["vocab_size"] = options.get("vocab_size") or dataset.vocab_size
    options["max_seq_len"] = options.get("max_seq_len") or config.data["seq_len"]
    known = [field.name for field in dataclasses.fields(GPTConfig)]
    for key in options:
        if key not in known:
            raise UserError(f"config key model.{key} does not exist; {did_you_mean(key, known)}")
    try:
        model = GPT(GPTConfig(**options))
    except (TypeError, ValueError) as error:
        raise UserError(f"config section model: {error}") from error
    if options["vocab_size"] < dataset.vocab_size:
        raise UserError(
            f"model.vocab_size={options['vocab_size']} is smaller than the data's vocabulary of "
            f"{dataset.vocab_size} tokens; leave it 0 to follow the data"
        )
    if config.data["seq_len"] > options["max_seq_len"]:
        raise UserError(
            f"data.seq_len={config.data['seq_len']} is longer than model.max_seq_len="
            f"{options['max_seq_len']}; lower the one or raise the other"
        )
    return model
