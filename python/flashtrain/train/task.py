"""A task is a kind of model and its data, as the loop needs them.

The key `model.family` picks the task; a new family is a class and a line in `TASKS`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from flashtrain.data import describe_samples
from flashtrain.distributed import World
from flashtrain.errors import UserError, did_you_mean
from flashtrain.eval import Scorer, run_benchmarks
from flashtrain.models.gpt import GPT, GPTConfig
from flashtrain.models.wrapping import evaluating
from flashtrain.train import rng
from flashtrain.train.build import build_dataset, build_model
from flashtrain.train.config import RunConfig, check_size
from flashtrain.train.precision import Precision
from flashtrain.train.vision_task import VisionTask

_PROMPT = "\n"
_TEMPERATURE = 0.8
_TOP_K = 200
_SHOWN_SAMPLES = 8


class Task(Protocol):
    """A model, its data, and their measurements.

    Attributes:
        config_class: a dataclass of the keys of the config's section `model`.
        metrics: means over items that a validation gives, logged as val/<name>; "loss" is first.
        item: the parts of a sample, in the plural, as in "tokens/s".
        items_per_sample: how many of them.
        flops_per_item: floating-point operations of the model, forward and backward.
        causal_flops_per_item: the same without what a causal mask hides.
        num_parameters: as the user sees it.
        metadata: of the data, such as its tokenizer; JSON that checkpoints keep under "data". With
            a `fingerprint` of the data's content, a run continues wherever the data is.
        model: on the CPU in fp32. `model(*batch)` is the mean loss of a batch, an fp32 scalar.
            `model.blocks` is an nn.ModuleList of what FSDP2 shards one by one.
    """

    config_class: ClassVar[type]
    metrics: ClassVar[tuple[str, ...]]
    item: ClassVar[str]
    items_per_sample: int
    flops_per_item: int
    causal_flops_per_item: int
    num_parameters: int
    metadata: dict[str, Any]
    model: nn.Module

    def train_samples(
        self, first_sample: int, count: int, *, rank: int, world_size: int
    ) -> Sequence[Tensor]:
        """This rank's share of consecutive samples of the run: tensors [count / world_size, ...]
        on the CPU, a pure function of the arguments and the config."""

    def val_batches(
        self, batch_size: int, rank: int, world_size: int
    ) -> Iterator[Sequence[Tensor]]:
        """The whole validation split, shared by ranks; their numbers of batches may differ."""

    def val_sums(self, forward: Callable[..., Tensor], batch: Sequence[Tensor]) -> Tensor:
        """fp64 [1 + len(metrics)] on the device: the batch's items, and each metric's sum over
        them. `forward` is the model, compiled or not."""

    def write_sample(self, precision: Precision, length: int, seed: int) -> str:
        """Something the model makes, to look at; "" if that is not its kind."""

    def run_benchmarks(
        self, files: Mapping[str, Path], world: World, precision: Precision, batch_size: int
    ) -> dict[str, float]:
        """Results by <benchmark>/<name>, the same on every rank."""

    def describe(self, samples: range) -> str:
        """The places of samples in the data, in lines for the log."""


class LanguageModelTask:
    """GPT on windows of tokens."""

    config_class = GPTConfig
    metrics = ("loss",)
    item = "tokens"

    def __init__(self, config: RunConfig, world: World):
        check_size(config.data, "seq_len")
        self._dataset = build_dataset(config)
        rng.seed_everything(config.trainer.seed)
        self.model: GPT = build_model(config, self._dataset)
        self.items_per_sample = config.data["seq_len"]
        self.num_parameters = self.model.num_parameters()
        self.flops_per_item = self.model.flops_per_token(self.items_per_sample)
        # A token attends to half of the window on average.
        self.causal_flops_per_item = self.model.flops_per_token(self.items_per_sample // 2)
        self.metadata = {
            "tokenizer": self._dataset.tokenizer.name,
            "vocab_size": self._dataset.vocab_size,
            "fingerprint": self._dataset.fingerprint,
        }

    def train_samples(
        self, first_sample: int, count: int, *, rank: int, world_size: int
    ) -> Sequence[Tensor]:
        """(tokens, targets), int64 [count / world_size, T]."""
        return self._dataset.train_samples(first_sample, count, rank=rank, world_size=world_size)

    def val_batches(
        self, batch_size: int, rank: int, world_size: int
    ) -> Iterator[Sequence[Tensor]]:
        """(tokens, targets), int64 [at most batch_size, T]."""
        return self._dataset.val_batches(batch_size, rank=rank, world_size=world_size)

    def val_sums(self, forward: Callable[..., Tensor], batch: Sequence[Tensor]) -> Tensor:
        """Targets, and the sum of their cross entropy in nats."""
        loss, count = forward(*batch), batch[1].numel()
        return torch.stack([torch.full_like(loss, count), loss * count]).double()

    def write_sample(self, precision: Precision, length: int, seed: int) -> str:
        """Text of `length` tokens that the model writes after a line break."""
        dataset, device = self._dataset, next(self.model.parameters()).device
        prompt_BT = torch.tensor([dataset.tokenizer.encode(_PROMPT)], device=device)
        with precision.autocast():
            tokens_BT = self.model.generate(
                prompt_BT,
                length,
                temperature=_TEMPERATURE,
                top_k=_TOP_K,
                generator=torch.Generator(device).manual_seed(seed),
            )
        # A model may have more tokens than the data; those have no text.
        tokens = [t for t in tokens_BT[0].tolist() if t < dataset.tokenizer.vocab_size]
        return dataset.tokenizer.decode(tokens[prompt_BT.shape[1] :])

    def run_benchmarks(
        self, files: Mapping[str, Path], world: World, precision: Precision, batch_size: int
    ) -> dict[str, float]:
        """Benchmarks of `flashtrain.eval`, with the weights as they are now."""
        scorer = Scorer(
            self.model,
            self._dataset.tokenizer,
            self.model.config.max_seq_len,
            batch_size,
            world,
            precision.autocast,
        )
        with evaluating(self.model):  # without dropout
            return run_benchmarks(files, scorer)

    def describe(self, samples: range) -> str:
        """A line for each of the first samples: its place in the data, how its text begins."""
        lines = describe_samples(self._dataset, samples[:_SHOWN_SAMPLES])
        if more := len(samples) - len(lines):
            lines.append(f"and {more} more")
        return "\n".join(lines)


DEFAULT_FAMILY = "gpt"
TASKS: dict[str, Any] = {"gpt": LanguageModelTask, "vit": VisionTask}


def task_class(family: str) -> Any:
    """The class of a `model.family`. Raises UserError if there is none."""
    if family not in TASKS:
        raise UserError(
            f"config key model.family: {family!r} is not known; {did_you_mean(family, TASKS)}"
        )
    return TASKS[family]


def build_task(config: RunConfig, world: World) -> Task:
    """Loads the data and makes the model of a run, with its first weights."""
    return task_class(config.model.get("family", DEFAULT_FAMILY))(config, world)
