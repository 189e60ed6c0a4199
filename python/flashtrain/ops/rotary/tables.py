"""Tables of cosines and sines for flashtrain.ops.rotary.RotaryEmbedding, and how long they last.

A table is a function of its position alone: row t is the same in tables of any length, so that
queries and keys that were rotated in different calls fit each other.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flashtrain.ops._arguments import checked
from flashtrain.ops.rotary.scaling import RotaryScaling

# XPos scales position t by decay**((t - origin) / scale_base). Only differences of positions count
# in the products of queries and keys, so any origin will do; this one is the middle of the 2,048
# positions of the paper, with its scale_base of 512.
_XPOS_ORIGIN_IN_SCALE_BASES = 2.0
_LARGEST_EXPONENT = 87.0  # of e; beyond it, float32 or its reciprocal overflows


class Tables(NamedTuple):
    """[length, R / 2]; the last two None where they are the first."""

    cos: Tensor
    sin: Tensor
    cos_k: Tensor | None = None
    sin_k: Tensor | None = None


def xpos_decay(dim: int, device: torch.device) -> Tensor:
    """Of each pair, by which its scale falls in scale_base positions; float64 [R / 2]."""
    pairs = torch.arange(0, dim, 2, dtype=torch.float64, device=device)
    return (pairs + 0.4 * dim) / (1.4 * dim)


def longest_xpos(scale_base: float) -> int:
    """The length of tables beyond which float32 cannot hold the scales of XPos."""
    return int((_LARGEST_EXPONENT / math.log(1.4 / 0.4) + _XPOS_ORIGIN_IN_SCALE_BASES) * scale_base)


def make_tables(
    dim: int,
    base: float,
    scale_base: float | None,
    scaling: RotaryScaling,
    length: int,
    device: torch.device,
) -> Tables:
    # float64: in float32 the angle of position 100,000 is off by 0.004.
    t = torch.arange(length, dtype=torch.float64, device=device)
    angles = torch.outer(t, scaling.frequencies(dim, base).to(device))
    factor = scaling.table_factor
    cos, sin = angles.cos() * factor, angles.sin() * factor
    if scale_base is None:
        return Tables(cos.float(), sin.float())
    power = t / scale_base - _XPOS_ORIGIN_IN_SCALE_BASES
    scale = xpos_decay(dim, device) ** power.unsqueeze(-1)
    return Tables(
        (cos * scale).float(), (sin * scale).float(), (cos / scale).float(), (sin / scale).float()
    )


def may_be_kept(tables: Tables) -> bool:
    """Whether other calls may use them: not if a compiler or a mode that is on made them.

    What a compiled graph gives out may be overwritten by its next run (CUDA graphs); fake and
    functional tensors make sense under their mode only, and meta tensors are no tables.
    """
    cos = tables.cos
    return (
        not torch.compiler.is_compiling()
        and type(cos) is Tensor
        and not torch._is_functional_tensor(cos)
        and not torch._C._functorch.is_functorch_wrapped_tensor(cos)
        and not cos.is_meta
    )


class RotaryTables(nn.Module):
    """Makes tables and keeps those that other calls may use; see RotaryEmbedding, which rotates.

    A kept table stays for as long as the module does, since a CUDA graph may read it.
    """

    @checked
    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
        *,
        scaling: RotaryScaling | None = None,
    ) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"dim: got {dim}; supported: even, at least 2")
        for name, value in (("base", base), ("scale_base", scale_base)):
            if value is not None and not 0.0 < value < math.inf:
                raise ValueError(f"{name}: got {value}; supported: greater than 0, finite")
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.scaling = scaling or RotaryScaling()
        self._tables: Tables | None = None  # of the last call
        self._kept: dict[torch.device, list[Tables]] = {}  # longer and longer ones
        self._table_dtype = torch.float32  # of _cos_cached and its kin alone
        if device is not None:
            self.extend_tables(1, device)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tables": None, "_kept": {}}

    # --- Tables ---

    @checked
    def extend_tables(self, length: int, device: torch.device | str) -> None:
        """Makes tables of at least `length` positions on the device, if there are none yet.

        `forward` does it by itself; do it before a CUDA graph is captured, and before a compiled
        model runs, which otherwise makes tables in each call.
        """
        self._tables_for(length, torch.empty(0, device=device).device)

    def _tables_for(self, length: int, device: torch.device, anew: bool = False) -> Tables:
        tables = self._tables
        if (
            tables is not None
            and not anew
            and tables.cos.shape[0] >= length
            and tables.cos.device == device
        ):
            return tables
        if torch.compiler.is_compiling():
            return self._make_tables(length, device)
        kept = self._kept.get(device)
        if kept is not None and not anew:
            if kept[-1].cos.shape[0] >= length:
                self._tables = kept[-1]
                return self._tables
            # Twice as long as before: tokens generated one by one do not make a table each.
            doubled = 2 * kept[-1].cos.shape[0]
            if self.scale_base is not None:
                doubled = min(doubled, longest_xpos(self.scale_base))
            length = max(length, doubled)
        with torch.inference_mode(False):
            tables = self._make_tables(length, device)
        if may_be_kept(tables):
            self._kept.setdefault(device, []).append(tables)
            self._tables = tables
        return tables

    def _make_tables(self, length: int, device: torch.device) -> Tables:
        compiles = torch.compiler.is_compiling()  # it cannot trace the question
        if not compiles and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"RotaryEmbedding: needs tables of {length} positions while a CUDA graph is "
                f"captured; supported: extend_tables({length}, {str(device)!r}) before"
            )
        if self.scale_base is not None and length > (longest := longest_xpos(self.scale_base)):
            raise ValueError(
                f"scale_base: got {self.scale_base} with {length} positions, whose scales float32 "
                f"cannot hold; supported: at most {longest} positions, more with a larger one"
            )
        with torch.no_grad():
            return make_tables(self.dim, self.base, self.scale_base, self.scaling, length, device)

    # --- What code for flash-attn reads ---

    def _update_cos_sin_cache(
        self,
        seqlen: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`extend_tables`, and the dtype in which _cos_cached and its kin are given from now on."""
        self.extend_tables(seqlen, self._device if device is None else device)
        self._table_dtype = dtype or self._table_dtype

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu") if self._tables is None else self._tables.cos.device

    @property
    def inv_freq(self) -> Tensor:
        """Angle per position of each pair, float32 [R / 2]."""
        return self.scaling.frequencies(self.dim, self.base).float().to(self._device)

    @property
    def scale(self) -> Tensor | None:
        """XPos' decay of each pair, float32 [R / 2]; None: off."""
        return None if self.scale_base is None else xpos_decay(self.dim, self._device).float()

    @property
    def _seq_len_cached(self) -> int:
        return 0 if self._tables is None else self._tables.cos.shape[0]

    def _cached(self, name: str) -> Tensor | None:
        table = getattr(self._tables, name, None)
        return None if table is None else table.to(self._table_dtype)

    @property
    def _cos_cached(self) -> Tensor | None:
        return self._cached("cos")

    @property
    def _sin_cached(self) -> Tensor | None:
        return self._cached("sin")

    @property
    def _cos_k_cached(self) -> Tensor | None:
        return self._cached("cos_k")

    @property
    def _sin_k_cached(self) -> Tensor | None:
        return self._cached("sin_k")
