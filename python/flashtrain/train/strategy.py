"""How ranks share the work and the state of a run.

| strategy | weights and gradients | optimizer state    | bytes per parameter on each of N ranks |
|----------|-----------------------|--------------------|----------------------------------------|
| ddp      | on every rank         | on every rank      | 16                                     |
| zero1    | on every rank         | split by parameter | 8 + 8 / N                              |
| fsdp2    | split by rows         | split by rows      | 16 / N, and a block gathered for use   |

ddp is torch's DistributedDataParallel, zero1 (Rajbhandari et al. 2020, P_os) the same with torch's
ZeroRedundancyOptimizer (optimizer.py), fsdp2 torch's fully_shard of each block and of the whole. On
one rank there is nothing to share and each of them is the plain model.

Gradients are summed over ranks in `trainer.reduce_dtype`, once a step, after the last micro batch.
Under fsdp2 with bf16 or fp16 the weights are cast before they are gathered, so that half the bytes
travel; gradients are accumulated and summed in fp32 all the same.
"""

import contextlib
import dataclasses
import inspect
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flashtrain.distributed import World
from flashtrain.train.config import RunConfig
from flashtrain.train.precision import LOW_PRECISION

# torch 2.13 renamed DistributedDataParallel's option and warns about the old name.
_DDP_OPTIONS = inspect.signature(DistributedDataParallel).parameters
_SYNC_BUFFERS = (
    "forward_sync_buffers" if "forward_sync_buffers" in _DDP_OPTIONS else "broadcast_buffers"
)


@dataclasses.dataclass(frozen=True)
class Shard:
    """The part of a parameter of the model that this rank holds.

    Attributes:
        name: as in `model.named_parameters()`; a parameter with several has its first one.
        parameter: the model's own.
        tensor: [rows here, ...], an alias of it: the model computes with the values written to it.
        shape: of the whole parameter.
        first_row: the first of these rows in it; None if this is all of it.
    """

    name: str
    parameter: nn.Parameter
    tensor: Tensor
    shape: torch.Size
    first_row: int | None = None

    def take_gradient(self) -> Tensor | None:
        """The gradient of `tensor`, which also becomes `tensor.grad`."""
        gradient: Any = self.parameter.grad
        if self.first_row is not None and gradient is not None:
            gradient = gradient.to_local()
            self.tensor.grad = gradient
        return gradient

    def drop_gradient(self) -> None:
        self.parameter.grad = self.tensor.grad = None


class Strategy:
    """A model shared among ranks.

    Attributes:
        forward: computes the loss; its backward sums the gradients over ranks.
        evaluate: computes the loss for validation.
        lockstep: ranks must call the model equally often, in validation too.
        shards: this rank's part of each parameter, in the order of the model.
    """

    def __init__(self, config: RunConfig, world: World, model: nn.Module, *, accumulates: bool):
        """Splits `model`, on the rank's device, if the strategy needs it.

        Args:
            accumulates: some step has several micro batches.
        """
        self._world = world
        self.name = config.trainer.strategy if world.size > 1 else "ddp"
        self.lockstep = self.name == "fsdp2"
        self.forward: Any
        self.evaluate: Any
        if self.lockstep:
            self.forward = self.evaluate = _fully_shard(config, world, model)
        else:
            compiled = torch.compile(model, dynamic=False) if config.trainer.compile else model
            self.evaluate = compiled
            self.forward = _replicate(config, world, compiled, accumulates)
        self.shards = _shards(model, world if self.lockstep else None)
        self._compiles = config.trainer.compile

    def compile_trouble(self) -> str:
        """Why torch.compile has not compiled all of the model so far; "" if it has."""
        if not self._compiles:
            return ""
        from torch._dynamo.utils import counters

        reasons = [" ".join(reason.split()) for reason in counters["graph_break"]]
        if not reasons:
            return ""
        return f"torch.compile leaves parts of the model out, which costs speed: {reasons[0]}"

    def micro_batch(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward of a micro batch: ranks sum gradients in the `last` one."""
        if self._world.size == 1:
            return contextlib.nullcontext()
        if self.lockstep:
            self.forward.set_requires_gradient_sync(last)
            return contextlib.nullcontext()
        return contextlib.nullcontext() if last else self.forward.no_sync()

    def weights_written(self) -> None:
        """To be called when shards were written other than by a training step.

        fsdp2 keeps some weights gathered from a forward pass without a backward one to the next.
        """
        if self.lockstep:
            for module in self.forward.modules():
                if hasattr(module, "reshard"):
                    module.reshard()

    @torch.no_grad()
    def parameter_norm(self) -> Tensor:
        """2-norm of all parameters, fp32 on the device, the same on every rank."""
        norms = torch._foreach_norm([shard.tensor for shard in self.shards])
        return self.norm_over_ranks(torch.linalg.vector_norm(torch.stack(norms).float()))

    def norm_over_ranks(self, norm: Tensor) -> Tensor:
        """2-norm of the whole gradient, the same on every rank, from that of this rank's shards."""
        return self._world.sum(norm.square()).sqrt() if self.lockstep else norm


def _replicate(config: RunConfig, world: World, model: Any, accumulates: bool) -> nn.Module:
    if world.size == 1:
        return model
    replica = DistributedDataParallel(
        model,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        **{_SYNC_BUFFERS: False},  # the model's buffers are constants
        gradient_as_bucket_view=True,
        static_graph=not accumulates,  # a static graph does not go with no_sync
    )
    if config.trainer.reduce_dtype == "bf16":
        replica.register_comm_hook(world.size, _mean_in_bf16)
    return replica


def _mean_in_bf16(ranks: int, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A hook of DistributedDataParallel; torch's own refuses to run without a GPU."""
    gradient = bucket.buffer()
    sent = gradient.to(torch.bfloat16).div_(ranks)
    done: Any = dist.all_reduce(sent, async_op=True)
    return done.get_future().then(lambda future: gradient.copy_(future.value()[0]))


def _fully_shard(config: RunConfig, world: World, model: nn.Module) -> nn.Module:
    # Blocks return views; it warns of writing into them, which the model does not.
    warnings.filterwarnings("ignore", message=".*FSDP2-wrapped module .* returned a view tensor")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    options: dict[str, Any] = {
        "mesh": init_device_mesh(world.device.type, (world.size,)),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=LOW_PRECISION.get(config.trainer.precision),
            reduce_dtype=torch.bfloat16 if config.trainer.reduce_dtype == "bf16" else torch.float32,
            cast_forward_inputs=False,  # autocast does, and leaves an fp32 residual stream alone
        ),
    }
    if config.trainer.compile:
        # Blocks that differ in a number (scale_attn_by_inverse_layer_idx) are compiled again, with
        # and without gradients and for a last, smaller batch; beyond the limit, they are not.
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * len(model.blocks))
    for block in model.blocks:
        if config.trainer.compile:
            block.compile(dynamic=False)
        fully_shard(block, **options)
    fully_shard(model, **options)
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")
    return model


def _shards(model: nn.Module, world: World | None) -> list[Shard]:
    """Of each trained parameter; `world` if its rows are split."""
    found = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if world is None:
            found.append(Shard(name, parameter, parameter, parameter.shape))
            continue
        local = parameter.to_local().detach()
        rows = parameter.shape[0]
        # fully_shard cuts as torch.chunk does: equal pieces, the last ones shorter or empty.
        first_row = min(rows, world.rank * -(-rows // world.size))
        found.append(Shard(name, parameter, local, parameter.shape, first_row))
    return found
