"""What the rotary tests share: a case, its inputs and positions, and the reference."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from flashtrain.ops.reference import rotary as reference
from flashtrain.testing import tolerances
from flashtrain.testing.devices import DEVICE

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
TABLE_LEN = 50


@dataclasses.dataclass(frozen=True)
class Case:
    shape: tuple[int, ...] = (2, 7, 3, 64)
    rotary_dim: int = 64
    dtype: torch.dtype = BF16
    table: torch.dtype = FP32
    interleaved: bool = False

    def x(self) -> Tensor:
        torch.manual_seed(0)
        return torch.randn(self.shape, device=DEVICE).to(self.dtype).requires_grad_()

    def tables(self, seed: int = 1) -> tuple[Tensor, Tensor]:
        """cos, sin. Any numbers will do: nothing relies on their being of one angle."""
        generator = torch.Generator().manual_seed(seed)
        tables = torch.randn(2, TABLE_LEN, self.rotary_dim // 2, generator=generator)
        cos, sin = tables.to(DEVICE, self.table)
        return cos, sin


def positions_of(
    shape: tuple[int, ...],
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: list[int] | None = None,
) -> Tensor:
    """The position of every token, [B, S], or [T] with cu_seqlens."""
    if cu_seqlens is None:
        batch, seqlen = shape[:2]
        offsets = torch.as_tensor(seqlen_offsets, device=DEVICE).long().reshape(-1, 1)
        return (torch.arange(seqlen, device=DEVICE) + offsets).expand(batch, seqlen)
    lengths = [end - start for start, end in itertools.pairwise(cu_seqlens)]
    offsets = torch.as_tensor(seqlen_offsets).long().expand(len(lengths)).tolist()
    ranges = [torch.arange(o, o + n, device=DEVICE) for o, n in zip(offsets, lengths)]
    return torch.cat([torch.zeros(0, dtype=torch.int64, device=DEVICE), *ranges])


def expect(
    name: str,
    output: Tensor,
    x: Tensor,
    tables: tuple[Tensor, Tensor],
    positions: Tensor,
    interleaved: bool,
) -> None:
    """Output and gradient of `output = rotary(x)` by the two-sided rule."""
    torch.manual_seed(2)
    grad = torch.randn_like(output)
    double = x.detach().double().requires_grad_()
    exact = reference.apply_rotary_emb(
        double,
        *tables,
        position_ids=positions,
        interleaved=interleaved,
        compute_dtype=torch.float64,
    )
    in_torch = reference.apply_rotary_emb(
        x, *tables, position_ids=positions, interleaved=interleaved
    )
    tolerances.assert_as_exact_as_torch(
        name, output.detach(), in_torch.detach(), exact.detach(), tolerances.K_OUTPUT
    )
    (ours,) = torch.autograd.grad(output, x, grad, retain_graph=True)
    (theirs,) = torch.autograd.grad(in_torch, x, grad)
    (right,) = torch.autograd.grad(exact, double, grad.double())
    tolerances.assert_as_exact_as_torch(f"d{name}", ours, theirs, right, tolerances.K_OUTPUT)
