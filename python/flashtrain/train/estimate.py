"""What a run will take, before it is started: memory, operations, tokens, hours.

Memory is found by running a step of the model on fake tensors, which have shapes and no data, under
torch's MemTracker: every allocation of PyTorch is followed, on any machine and in about a second.
What the kernels of `flashtrain.ops` allocate inside is added: the chunk of logits of the fused
head. Not counted is what torch.cuda.max_memory_allocated does not count either: the CUDA context
(about 0.5 GB) and what the caching allocator holds in reserve.

    estimate(config, ranks=8, device_memory=80 * 10**9, peak_flops=989e12)
"""

import dataclasses
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flashtrain.errors import UserError
from flashtrain.models.gpt import GPT
from flashtrain.ops._linear_cross_entropy_ops import chunk_rows
from flashtrain.train.batches import BatchPlan
from flashtrain.train.build import build_gpt
from flashtrain.train.config import RunConfig
from flashtrain.train.precision import LOW_PRECISION
from flashtrain.train.task import DEFAULT_FAMILY

# Share of peak FLOP/s that these models reach on an H100, see experiments/benchmarks/results.
_EXPECTED_MFU = 0.45
_MOMENTS_BYTES = 8  # of AdamW, per parameter, fp32
_HEADROOM = 0.95  # of the device's memory, for the allocator's fragments and the CUDA context


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the moment when most are in use."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # what the backward pass needs, and what is at work
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
    plan, steps = BatchPlan(config, ranks), config.trainer.max_steps
    # No attention kernel for GPUs keeps a mask, but torch's for CPUs, which is traced, would.
    traced = dataclasses.replace(config, model=dict(config.model) | {"attn_dropout": 0.0})
    with FakeTensorMode():
        model = build_gpt(traced)
        parameters = model.num_parameters()
        seq_len = config.data["seq_len"]
        memory = _memory(config, plan, ranks, model)
    flops_per_token = model.flops_per_token(seq_len)
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


def host_memory() -> int:
    """Bytes of this machine's main memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _memory(config: RunConfig, plan: BatchPlan, ranks: int, model: GPT) -> Memory:
    trainer = config.trainer
    low = LOW_PRECISION.get(trainer.precision)
    sharded = ranks if trainer.strategy == "fsdp2" else 1
    count = sum(p.numel() for p in model.parameters())
    weight_bytes, master_bytes = 4, 0
    if trainer.low_precision_weights and low is not None and sharded == 1:
        weight_bytes, master_bytes = 2, 4
        for parameter in model.parameters():
            parameter.data = parameter.data.to(low)
    states = (_MOMENTS_BYTES + master_bytes) * count
    if trainer.strategy in ("zero1", "fsdp2"):
        states //= ranks
    tokens_BT = torch.zeros(plan.micro, config.data["seq_len"], dtype=torch.int64)
    # One rank with a single micro batch makes its gradients while activations are being freed.
    gradients_at_peak = plan.accumulates or ranks > 1
    peak = _peak_without_parameters(model, (tokens_BT, tokens_BT), low, gradients_at_peak)
    logits = _logits_bytes(model, tokens_BT.numel(), low)
    gradients = weight_bytes * count if gradients_at_peak else 0
    if model.head.fused:
        peak += logits  # inside the op, where the tracker does not see it
    weights, activations = weight_bytes * count // sharded, peak - logits
    if sharded > 1:  # a block is gathered while it is used, and the next one meanwhile
        largest = max(sum(p.numel() for p in block.parameters()) for block in model.blocks)
        activations += 2 * (2 if low is not None else 4) * largest
    return Memory(weights, gradients // sharded, states, activations, logits)


def _peak_without_parameters(
    model: nn.Module, batch: tuple[Tensor, ...], low: torch.dtype | None, gradients_exist: bool
) -> int:
    """Most bytes in use in a forward and backward pass, without the parameters and, where they
    exist before it begins, the gradients."""
    # Imported here: a private module of torch's, which only this function needs.
    from torch.distributed._tools.mem_tracker import MemTracker

    if gradients_exist:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
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


def _logits_bytes(model: GPT, tokens: int, low: torch.dtype | None) -> int:
    """Of the fused head one chunk; else the logits, these in fp32, and their log-probabilities."""
    columns, itemsize = model.config.padded_vocab_size, 4 if low is None else low.itemsize
    if model.head.fused:
        rows = chunk_rows(tokens, columns, model.config.d_model, itemsize)
        return rows * columns * itemsize
    return tokens * columns * (4 + 4 + (itemsize if low is not None else 0))
