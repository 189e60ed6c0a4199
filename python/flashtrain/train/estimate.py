"""The needs of a run before it is started: memory, operations, tokens, hours.

Memory is found by running a step of the model on fake tensors, which have shapes and no data, under
torch's MemTracker: every allocation of PyTorch is followed, on any machine. Blocks are the same, so
a model of two blocks and one of three give the memory of any number of them. The chunk of logits
that the fused head allocates inside its op is added. Like torch.cuda.max_memory_allocated, the
estimate does not count the CUDA context (about 0.5 GB) and the reserve of the caching allocator.

    estimate(config, ranks=8, device_memory=80 * 10**9, peak_flops=989e12)
    largest_micro_batch(config, ranks=8, device_memory=80 * 10**9)
"""

import dataclasses
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flashtrain.errors import UserError
from flashtrain.models.gpt import GPT
from flashtrain.models.vit import ViT
from flashtrain.ops.linear_cross_entropy import chunk_rows
from flashtrain.train.batches import BatchPlan, micro_batches
from flashtrain.train.build import build_gpt
from flashtrain.train.config import RunConfig
from flashtrain.train.precision import LOW_PRECISION
from flashtrain.train.task import DEFAULT_FAMILY
from flashtrain.train.vision_task import build_vit

# Share of peak FLOP/s that these models reach on an H100, see experiments/benchmarks/results.
_EXPECTED_MFU = 0.45
_MOMENTS_BYTES = 8  # of AdamW, per parameter, fp32
_TRACED_LAYERS = (2, 3)
_HEADROOM = 0.95  # of the device's memory, for the allocator's fragments and the CUDA context


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the moment when most are in use."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # saved for the backward pass, or in use
    logits: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The figures of a run.

    Attributes:
        flops_per_token: forward and backward.
        tokens: of the whole run.
        device_memory: bytes of the smallest device; None if it is not known.
        hours: at the expected share of the devices' peak; None if that is not known.
    """

    parameters: int
    flops_per_token: int
    memory: Memory
    device_memory: int | None
    ranks: int
    micro_batch: int
    accumulation: int
    tokens: int
    steps: int
    hours: float | None

    @property
    def fits(self) -> bool | None:
        if self.device_memory is None:
            return None
        return self.memory.total <= _HEADROOM * self.device_memory

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "parameters": self.parameters,
            "flops_per_token": self.flops_per_token,
            "memory_bytes": dataclasses.asdict(self.memory) | {"total": self.memory.total},
            "device_memory_bytes": self.device_memory,
            "fits": self.fits,
            "ranks": self.ranks,
            "micro_batch": self.micro_batch,
            "accumulation": self.accumulation,
            "tokens": self.tokens,
            "steps": self.steps,
            "hours": self.hours,
        }

    def text(self) -> str:
        """For a reader, in lines."""
        parts = dataclasses.asdict(self.memory) | {"total": self.memory.total}
        lines = [
            f"parameters        {self.parameters:,}",
            f"FLOPs per token   {self.flops_per_token:,}",
            f"steps             {self.steps:,} of {self.ranks} x {self.accumulation} micro batches"
            f" of {self.micro_batch}",
            f"tokens            {self.tokens:,}",
            "memory of a rank  "
            + ", ".join(f"{k} {v / 2**30:.2f}" for k, v in parts.items())
            + " GiB",
        ]
        if self.device_memory is not None:
            verdict = "fits" if self.fits else "does not fit: lower --config.data.batch_size"
            lines.append(f"device memory     {self.device_memory / 2**30:.2f} GiB: {verdict}")
        hours = "not known for this device" if self.hours is None else f"{self.hours:,.1f}"
        lines.append(f"hours             {hours}")
        return "\n".join(lines)


def estimate(
    config: RunConfig, ranks: int, device_memory: int | None, peak_flops: float | None
) -> Estimate:
    """Estimates a run of a GPT.

    Args:
        ranks: processes of the run.
        device_memory: bytes of each rank's device; None if not known.
        peak_flops: of each rank's device, in FLOP/s; None if not known.

    Raises:
        UserError: the config is wrong, or of another family of models.
    """
    family = config.model.get("family", DEFAULT_FAMILY)
    if family != "gpt":
        raise UserError(f"--dry_run knows models of the family gpt, this one is a {family}")
    if device_memory is not None:
        config = with_micro_batch(config, ranks, device_memory)
    plan, steps = BatchPlan(config, ranks), config.trainer.max_steps
    model, seq_len = _build(config), config.data["seq_len"]
    parameters, flops_per_token = model.num_parameters(), model.flops_per_token(seq_len)
    memory = _memory(config, ranks, plan.micro, accumulates=plan.accumulates)
    tokens = plan.first_sample(steps) * seq_len
    hours = None
    if peak_flops is not None:
        hours = tokens * flops_per_token / (_EXPECTED_MFU * peak_flops * ranks) / 3600
    return Estimate(
        parameters,
        flops_per_token,
        memory,
        device_memory,
        ranks,
        plan.micro,
        plan.cut(steps - 1).accumulation,
        tokens,
        steps,
        hours,
    )


def largest_micro_batch(config: RunConfig, ranks: int, device_memory: int) -> int:
    """The largest micro batch whose step fits each rank's device.

    Activations are the largest of several sums that grow linearly with the micro batch: they are
    convex, and the line through those of the smallest and the largest is never below them.

    Args:
        ranks: processes of the run.
        device_memory: bytes of the smallest device.

    Raises:
        UserError: the config is wrong, or not even one sample fits.
    """
    choices = micro_batches(config, ranks)
    share = choices[-1]
    available = _HEADROOM * device_memory
    if _memory(config, ranks, share, accumulates=False).total <= available:
        return share
    least = _memory(config, ranks, 1, accumulates=share > 1)
    most = _memory(config, ranks, share, accumulates=share > 1)
    if least.total > available:
        raise UserError(
            f"one sample needs {least.total / 2**30:.1f} GiB on each of {ranks} devices, which "
            f"have {device_memory / 2**30:.1f} GiB; use more devices, "
            "--config.trainer.strategy=fsdp2, --config.model.activation_checkpointing=True or a "
            "smaller model"
        )

    def total(micro: int) -> float:
        way = (micro - 1) / (share - 1)
        activations = least.activations + way * (most.activations - least.activations)
        logits = _logits_bytes(config, micro)
        return least.total - least.activations - least.logits + activations + logits

    return max(micro for micro in choices[:-1] if total(micro) <= available)


def with_micro_batch(config: RunConfig, ranks: int, device_memory: int) -> RunConfig:
    """The config, with the largest micro batch that fits where data.batch_size is 0."""
    if config.data["batch_size"]:
        return config
    micro = largest_micro_batch(config, ranks, device_memory)
    return dataclasses.replace(config, data=dict(config.data) | {"batch_size": micro})


def memory_of(device: torch.device, local_ranks: int) -> int:
    """Bytes that each rank of this machine may use: of its GPU, or of half the main memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (2 * local_ranks)


def _build(config: RunConfig, **changes: Any) -> Any:
    """The model on the meta device, with changed keys; no data is read."""
    build = build_vit if config.model.get("family", DEFAULT_FAMILY) == "vit" else build_gpt
    with torch.device("meta"):
        return build(dataclasses.replace(config, model=dict(config.model) | changes))


def _with_memory(model: nn.Module) -> Any:
    """The model with new tensors; nn.Module.to_empty cannot put fake ones in the place of meta."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            for name, tensor in slots.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(new) if is_parameter else new
                slots[name] = made[id(tensor)]  # tied ones stay tied
    return model


def _batch(config: RunConfig, micro: int, model: Any) -> tuple[Tensor, Tensor]:
    """The inputs of the model in training; zeros."""
    if isinstance(model, ViT):
        of = model.config
        images = torch.zeros(micro, of.num_channels, of.image_size, of.image_size)
        return images.to(torch.uint8), torch.zeros(micro, dtype=torch.int64)
    tokens_BT = torch.zeros(micro, config.data["seq_len"], dtype=torch.int64)
    return tokens_BT, tokens_BT


def _memory(config: RunConfig, ranks: int, micro: int, *, accumulates: bool) -> Memory:
    trainer = config.trainer
    low = LOW_PRECISION.get(trainer.precision)
    sharded = ranks if trainer.strategy == "fsdp2" else 1
    model = _build(config)
    count = sum(p.numel() for p in model.parameters())
    low_weights = trainer.low_precision_weights and low is not None and sharded == 1
    weight_bytes, master_bytes = (2, 4) if low_weights else (4, 0)
    states = (_MOMENTS_BYTES + master_bytes) * count
    if trainer.strategy in ("zero1", "fsdp2"):
        states //= ranks
    # One rank with a single micro batch makes its gradients while activations are being freed.
    gradients_exist = accumulates or ranks > 1
    two, three = (
        _peak_without_parameters(config, layers, micro, low, low_weights, gradients_exist)
        for layers in _TRACED_LAYERS
    )
    activations = two + (three - two) * (len(model.blocks) - _TRACED_LAYERS[0])
    logits = _logits_bytes(config, micro)
    if isinstance(model, GPT) and not model.head.fused:
        activations -= logits  # the tracker saw them; in the fused op, it does not
    gradients = weight_bytes * count if gradients_exist else 0
    if sharded > 1:  # a block is gathered while it is used, and the next one meanwhile
        largest = max(sum(p.numel() for p in block.parameters()) for block in model.blocks)
        activations += 2 * (2 if low is not None else 4) * largest
    return Memory(
        weight_bytes * count // sharded, gradients // sharded, states, activations, logits
    )


def _peak_without_parameters(
    config: RunConfig,
    num_layers: int,
    micro: int,
    low: torch.dtype | None,
    low_weights: bool,
    gradients_exist: bool,
) -> int:
    """Most bytes in use in a forward and backward pass, without the parameters and, where they
    exist before it begins, the gradients."""
    # Imported here: a private module of torch's, which only this function needs.
    from torch.distributed._tools.mem_tracker import MemTracker

    with FakeTensorMode():
        # torch's kernel for CPUs, which is traced, keeps a mask; attention on GPUs does not.
        model = _with_memory(_build(config, num_layers=num_layers, attn_dropout=0.0))
        if low_weights:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(low)
        if gradients_exist:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        batch = _batch(config, micro, model)
        model.train()
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            with torch.autocast("cpu", low, enabled=low is not None):
                loss = model(*batch)
            loss.backward()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    return int(peak["Total"]) - own * (2 if gradients_exist else 1)


def _logits_bytes(config: RunConfig, micro: int) -> int:
    """One chunk of a fused head; otherwise logits, the same in fp32, and log-probabilities.

    A ViT has so few that they count as activations.
    """
    model, low = _build(config), LOW_PRECISION.get(config.trainer.precision)
    if isinstance(model, ViT):
        return 0
    tokens = micro * config.data["seq_len"]
    columns, itemsize = model.config.padded_vocab_size, 4 if low is None else low.itemsize
    if model.head.fused:
        rows = chunk_rows(tokens, columns, model.config.d_model, itemsize)
        return rows * columns * itemsize
    return tokens * columns * (4 + 4 + (itemsize if low is not None else 0))
