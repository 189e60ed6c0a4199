"""An exponential moving average of the weights (Polyak & Juditsky 1992).

    average <- decay * average + (1 - decay) * weights        after every step

in fp32, starting from the first weights. A skipped step counts, with unchanged weights.
"""

import contextlib
from collections.abc import Iterator

import torch

from flashtrain.train.strategy import Strategy


class Ema:
    """The average of a rank's shards: 4 bytes for each parameter that it holds."""

    def __init__(self, strategy: Strategy, decay: float):
        self._strategy = strategy
        self._decay = decay
        shards = strategy.shards
        self._weights = [shard.tensor for shard in shards if shard.tensor.numel()]
        self.averages = {
            shard.name: shard.tensor.detach().clone() for shard in shards if shard.tensor.numel()
        }

    @torch.no_grad()
    def update(self) -> None:
        """After a step."""
        torch._foreach_lerp_(list(self.averages.values()), self._weights, 1 - self._decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Swaps the average with the weights, and back at the end."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, weights in zip(self.averages.values(), self._weights, strict=True):
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)
        self._strategy.weights_written()
