"""One optimizer step: forward and backward over the micro batches, clipping, update.

Legend: B batch, T sequence.
"""

import contextlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flashtrain.distributed import World
from flashtrain.train import rng
from flashtrain.train.build import BatchSizes
from flashtrain.train.config import RunConfig
from flashtrain.train.optimizer import step_unless
from flashtrain.train.precision import Precision
from flashtrain.train.schedule import learning_rate

# torch 2.13 renamed DistributedDataParallel's option and warns about the old name.
_DDP_OPTIONS = inspect.signature(DistributedDataParallel).parameters
_SYNC_BUFFERS = (
    "forward_sync_buffers" if "forward_sync_buffers" in _DDP_OPTIONS else "broadcast_buffers"
)


class TrainStep:
    """Computes steps of one run on one rank; the host waits for no device in it.

    Args:
        model: returns the mean loss of (tokens, targets); compiled or not.
        optimizer: a fused one, over the parameters of `model`.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        batch: BatchSizes,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
    ):
        self._config = config
        self._world = world
        self._batch = batch
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._model: Any = _replicate(model, world, batch.accumulation)
        self._optimizer = optimizer
        self._precision = precision

    def __call__(
        self, step: int, tokens_BT: Tensor, targets_BT: Tensor, asked_to_stop: bool
    ) -> Tensor:
        """Does 0-based `step`; leaves everything as it was if loss or gradient is not finite.

        Args:
            step: optimizer steps done before.
            tokens_BT, targets_BT: int64 [B, T] on the device, this rank's share of the batch.
            asked_to_stop: told to all ranks, so that they stop after the same step.

        Returns:
            fp32 [4] on the device, equal on all ranks: loss, gradient norm, skipped, asked to stop.
        """
        optimizer, scaler = self._optimizer, self._precision.scaler
        trainer = self._config.trainer
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, self._config.optim, trainer.max_steps)
        loss = self._accumulate_gradients(step, tokens_BT, targets_BT)
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self._parameters, trainer.grad_clip or float("inf"))
        shared = torch.stack([loss, torch.full_like(loss, float(asked_to_stop))])
        loss_sum, stop = self._world.sum(shared)
        loss = loss_sum / self._world.size
        skip = ~(loss.isfinite() & grad_norm.isfinite())
        step_unless(optimizer, skip)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack([loss, grad_norm.float(), skip.float(), stop])

    def _accumulate_gradients(self, step: int, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Gradients of the mean loss over all ranks' micro batches; this rank's mean loss."""
        count, scaler = self._batch.accumulation, self._precision.scaler
        micro_batches = zip(
            tokens_BT.split(self._batch.micro), targets_BT.split(self._batch.micro), strict=True
        )
        total = torch.zeros((), device=tokens_BT.device)
        for i, (tokens, targets) in enumerate(micro_batches):
            rng.seed_micro_batch(self._config.trainer.seed, step, self._world.rank * count + i)
            # Ranks average their gradients once, during the last backward pass.
            accumulate_only = self._world.size > 1 and i + 1 < count
            with self._model.no_sync() if accumulate_only else contextlib.nullcontext():
                with self._precision.autocast():
                    loss = self._model(tokens, targets) / count
                scaler.scale(loss).backward()
            total += loss.detach()
        return total


def _replicate(model: nn.Module, world: World, accumulation: int) -> nn.Module:
    if world.size == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        **{_SYNC_BUFFERS: False},  # the model's buffers are constants
        gradient_as_bucket_view=True,
        static_graph=accumulation == 1,  # a static graph does not go with no_sync
    )
