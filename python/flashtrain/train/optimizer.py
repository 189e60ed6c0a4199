"""AdamW with the recipes' parameter groups, whose steps the device can skip, and state by name."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flashtrain.ops.adamw import FusedAdamW, global_grad_norm
from flashtrain.train.config import OptimConfig
from flashtrain.train.strategy import Shard


def decayed_names(model: nn.Module) -> set[str]:
    """Weights of nn.Linear decay; biases, norms and embeddings (hence a tied head) do not."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} - embeddings
    return {name for name, p in model.named_parameters() if id(p) in linear}


class Optimizer:
    """AdamW over a rank's shards: `flashtrain.ops.adamw`, or torch's where `optim.fused` is off.

    Args:
        decayed: names of the parameters that weight decay applies to.
        zero1: each rank keeps the moments of its own part of the parameters only, updates those and
            sends them to the others.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        decayed: Collection[str],
        optim: OptimConfig,
        *,
        zero1: bool = False,
    ):
        self._shards = [s for s in shards if s.tensor.numel()]
        groups = [
            {
                "params": [s.tensor for s in self._shards if (s.name in decayed) == decays],
                "weight_decay": optim.weight_decay if decays else 0.0,
            }
            for decays in (True, False)
        ]
        options: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
        self._fused = optim.fused
        adamw: Any = FusedAdamW if self._fused else torch.optim.AdamW
        if not self._fused:
            options["fused"] = True  # the only one of torch's that can skip a step on the device
        groups = [group for group in groups if group["params"]]
        self._outer: Any
        self._inner: Any  # holds the state
        if zero1:
            from torch.distributed.optim import ZeroRedundancyOptimizer

            self._outer = ZeroRedundancyOptimizer(
                groups, adamw, parameters_as_bucket_view=True, **options
            )
            self._inner = self._outer.optim
        else:
            self._outer = self._inner = adamw(groups, **options)
        mine = {id(p) for group in self._inner.param_groups for p in group["params"]}
        self._owned = [s for s in self._shards if id(s.tensor) in mine]

    @property
    def owned(self) -> Sequence[Shard]:
        """The shards whose moments this rank keeps."""
        return self._owned

    def gradient_norm(self) -> Tensor:
        """2-norm, an fp32 scalar, of the gradient that the model has left in this rank's shards."""
        gradients = [g for shard in self._shards if (g := shard.take_gradient()) is not None]
        norm = global_grad_norm if self._fused else nn.utils.get_total_norm
        return norm(gradients).float()

    def step(self, lr: float, divisor: Tensor, skip: Tensor) -> None:
        """One step, or none at all if `skip` holds: weights, moments and step counts stay as they
        are, without a wait for the host. The gradients are dropped.

        Args:
            divisor: fp32 scalar on the device, by which the gradients are divided first.
            skip: bool scalar on the device.
        """
        for group in self._outer.param_groups:
            group["lr"] = lr
        if self._fused:
            self._outer.step(grad_scale=divisor, skip=skip)
        else:
            # As torch.amp.GradScaler does it.
            self._inner.grad_scale, self._inner.found_inf = divisor, skip.float()
            try:
                self._outer.step()
            finally:
                del self._inner.grad_scale, self._inner.found_inf
        for shard in self._shards:
            shard.drop_gradient()

    def when_updated(self, act: Callable[[], None]) -> None:
        """Has `act` called in each step after the update, before zero1 sends the weights."""
        self._inner.register_step_post_hook(lambda *_: act())

    def state(self, shard: Shard) -> dict[str, Tensor]:
        """Moments and step count of one of the owned shards; empty before the first step."""
        return dict(self._inner.state.get(shard.tensor, {}))

    def load_state(self, shard: Shard, state: Mapping[str, Tensor]) -> None:
        """Restores the result of `state`, for the same rows; keeps the tensors.

        Hyperparameters stay those of the config.
        """
        device = shard.tensor.device
        self._inner.state[shard.tensor] = {key: value.to(device) for key, value in state.items()}
