"""Image classification: a ViT learns the labels of images."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashtrain.data.errors import DataError
from flashtrain.data.images import ImageDataset, load_images
from flashtrain.distributed import World
from flashtrain.errors import UserError, did_you_mean
from flashtrain.models.vit import ViT, ViTConfig
from flashtrain.train import rng
from flashtrain.train.config import RunConfig
from flashtrain.train.precision import Precision

_SHOWN_SAMPLES = 8


class VisionTask:
    """ViT on labeled images; see `flashtrain.train.task.Task`. A batch is (images, labels)."""

    config_class = ViTConfig
    metrics = ("loss", "accuracy")
    item = "images"
    items_per_sample = 1

    def __init__(self, config: RunConfig, world: World):
        options = {key: value for key, value in config.data.items() if key != "batch_size"}
        known = [k for k in inspect.signature(load_images).parameters if k != "image_size"]
        for key in options:
            if key not in known:
                raise UserError(f"config key data.{key} does not exist; {did_you_mean(key, known)}")
        with _user_errors():
            self._dataset: ImageDataset = load_images(
                **options, image_size=config.model.get("image_size", 0)
            )
        rng.seed_everything(config.trainer.seed)
        self.model = _build_model(config, self._dataset)
        self.num_parameters = self.model.num_parameters()
        seq_len = self.model.config.seq_len
        self.flops_per_item = seq_len * self.model.flops_per_token(seq_len)
        self.causal_flops_per_item = self.flops_per_item  # no mask hides anything
        self.metadata = {"num_classes": self._dataset.num_classes}

    def train_samples(
        self, first_sample: int, count: int, *, rank: int, world_size: int
    ) -> Sequence[Tensor]:
        """uint8 [count / world_size, C, I, I] and int64 [count / world_size]."""
        with _user_errors():
            return self._dataset.train_samples(
                first_sample, count, rank=rank, world_size=world_size
            )

    def val_batches(
        self, batch_size: int, rank: int, world_size: int
    ) -> Iterator[Sequence[Tensor]]:
        """uint8 [at most batch_size, C, I, I] and int64 [at most batch_size]."""
        with _user_errors():
            yield from self._dataset.val_batches(batch_size, rank=rank, world_size=world_size)

    def val_sums(self, forward: Callable[..., Tensor], batch: Sequence[Tensor]) -> Tensor:
        """Images, the sum of their cross entropy in nats, and how many are classified rightly."""
        images, labels = batch
        logits = forward(images).float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        correct = (logits.argmax(-1) == labels).sum()
        return torch.stack([torch.full_like(loss, len(labels)), loss, correct]).double()

    def write_sample(self, precision: Precision, length: int, seed: int) -> str:
        """A classifier makes nothing to look at."""
        return ""

    def run_benchmarks(
        self, files: Mapping[str, Path], world: World, precision: Precision, batch_size: int
    ) -> dict[str, float]:
        """There are none for images."""
        if files:
            raise UserError(f"trainer.benchmarks: {', '.join(files)} are for a gpt, this is a vit")
        return {}

    def describe(self, samples: range) -> str:
        """The images of samples."""
        indices, _ = self._dataset.sample_indices(samples.start, len(samples))
        more = len(indices) - _SHOWN_SAMPLES
        shown = ", ".join(self._dataset.name(int(index)) for index in indices[:_SHOWN_SAMPLES])
        return shown + (f" and {more} more" if more > 0 else "")


def _build_model(config: RunConfig, dataset: ImageDataset) -> ViT:
    """A model on the CPU, in fp32, with freshly drawn weights, that fits the data."""
    options = dict(config.model)
    # Left open, they follow the data.
    for key in ("image_size", "num_channels", "num_classes"):
        of_data = getattr(dataset, key)
        options[key] = options.get(key) or of_data
        if options[key] != of_data:
            raise UserError(
                f"model.{key}={options[key]} is not the data's {of_data}; leave it 0 to follow the "
                "data"
            )
    return build_vit(dataclasses.replace(config, model=options))


def build_vit(config: RunConfig) -> ViT:
    """A model with freshly drawn weights; its image size, channels and classes are given."""
    options: dict[str, Any] = {k: v for k, v in config.model.items() if k != "family"}
    known = [field.name for field in dataclasses.fields(ViTConfig)]
    for key in options:
        if key not in known:
            raise UserError(f"config key model.{key} does not exist; {did_you_mean(key, known)}")
    try:
        return ViT(ViTConfig(**options))
    except (TypeError, ValueError) as error:
        raise UserError(f"config section model: {error}") from error


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """Errors of the data become errors that the user can fix."""
    try:
        yield
    except DataError as error:
        raise UserError(str(error)) from error
