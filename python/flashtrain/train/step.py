"""One optimizer step: forward and backward over the micro batches, clipping, update."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flashtrain.distributed import World
from flashtrain.train import rng
from flashtrain.train.batches import BatchPlan
from flashtrain.train.config import RunConfig
from flashtrain.train.ema import Ema
from flashtrain.train.guard import Guard
from flashtrain.train.optimizer import Optimizer
from flashtrain.train.phases import PhaseTimer
from flashtrain.train.precision import Precision
from flashtrain.train.schedule import learning_rate
from flashtrain.train.strategy import Strategy

_CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class TrainStep:
    """Computes steps of one run on one rank; the host waits for no device in it."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        plan: BatchPlan,
        strategy: Strategy,
        optimizer: Optimizer,
        precision: Precision,
        guard: Guard,
        ema: Ema | None = None,
        timer: PhaseTimer | None = None,
    ):
        self._config = config
        self._world = world
        self._plan = plan
        self._strategy = strategy
        self._optimizer = optimizer
        self._precision = precision
        self._guard = guard
        self._ema = ema
        self._timer = timer or PhaseTimer(world.device)
        optimizer.when_updated(lambda: self._timer.mark("optimizer"))

    def __call__(self, step: int, batch: Sequence[Tensor], asked_to_stop: bool) -> Tensor:
        """Does 0-based `step`; leaves weights and moments as they were if the guard says so.

        Args:
            step: optimizer steps done before.
            batch: this rank's share of the step's samples, on the device.
            asked_to_stop: sent to all ranks, so that they stop after the same step.

        Returns:
            fp32 on the device, equal on all ranks, in the order of `StepStats.from_values`.
        """
        trainer = self._config.trainer
        losses = self._accumulate_gradients(step, batch)
        scale = self._precision.loss_scale.scale
        norm = self._strategy.norm_over_ranks(self._optimizer.gradient_norm()) / scale
        stop = torch.full_like(losses[:1], float(asked_to_stop))
        shared = self._world.sum(torch.cat([stop, losses]))
        loss = shared[1:].mean()
        skip = self._guard(loss, norm)
        clip = torch.ones_like(norm)
        if trainer.grad_clip:
            clip = ((norm + _CLIP_EPS) / trainer.grad_clip).clamp(min=1)
        lr = learning_rate(step, self._config.optim, trainer.max_steps)
        self._optimizer.step(lr, scale * clip, skip)
        self._timer.mark("communication")  # of zero1: the weights that other ranks updated
        if self._ema is not None:
            self._ema.update()
        values = torch.cat([torch.stack([loss, norm, skip.float(), scale]), shared])
        self._precision.loss_scale.update(~norm.isfinite())
        self._timer.mark("optimizer")
        return values

    def _accumulate_gradients(self, step: int, batch: Sequence[Tensor]) -> Tensor:
        """Leaves in the parameters the gradient of the mean loss over all ranks' micro batches.

        Returns:
            fp32 [micro batches of all ranks]: the losses of this rank's, 0 for the others'.
        """
        cut, scale = self._plan.cut(step), self._precision.loss_scale.scale
        first = self._world.rank * cut.accumulation
        losses = torch.zeros(self._world.size * cut.accumulation, device=self._world.device)
        micro_batches = zip(*(tensor.split(cut.micro) for tensor in batch), strict=True)
        for i, micro_batch in enumerate(micro_batches):
            rng.seed_micro_batch(self._config.trainer.seed, step, first + i)
            with self._strategy.micro_batch(last=i + 1 == cut.accumulation):
                with self._precision.autocast():
                    loss = self._strategy.forward(*micro_batch)
                scaled = loss * (scale / cut.accumulation)
                if i + 1 == cut.accumulation:
                    self._timer.mark_in_backward(scaled, "forward_backward")
                scaled.backward()
            losses[first + i] = loss.detach()
        self._timer.mark("communication")
        return losses
