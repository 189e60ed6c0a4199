"""Random calls of the functions of rotary; see flashtrain.testing.fuzz."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from flashtrain.ops import rotary
from flashtrain.ops.reference import rotary as reference
from flashtrain.ops.rotary.scaling import RotaryScaling
from flashtrain.ops.rotary.tables import make_tables
from flashtrain.testing.devices import DEVICE
from flashtrain.testing.fuzz import FLOATS, Call, Expected, spoiled, tensor, upper_bound


class _UnreadError(Exception):
    """Numbers in tensors that only a CPU looks at: on a GPU they may give any angle, or NaN."""


def _check_positions(a: dict[str, Any], x: Tensor) -> Tensor:
    """Of every token of x, those of `token_positions`; _UnreadError: it cannot be told."""
    if (cu_seqlens := a.get("cu_seqlens")) is not None:
        bounds = cu_seqlens.tolist()
        if bounds != sorted(bounds) or bounds[0] != 0 or bounds[-1] > x.shape[0]:
            raise _UnreadError("cu_seqlens")
    offsets = a.get("seqlen_offsets")
    positions = reference.token_positions(
        x, 0 if offsets is None else offsets, cu_seqlens, a.get("position_ids")
    )
    if cu_seqlens is None and a.get("position_ids") is not None:
        positions.expand(x.shape[:2])
    return positions


_REFERENCES: dict[str, Any] = {
    "x": reference.apply_rotary_emb,
    "qkv": reference.apply_rotary_emb_qkv_,
    "kv": reference.apply_rotary_emb_kv_,
}


class _Reference:
    def __init__(self, name: str, x: Tensor) -> None:
        self.name = name
        self.dtype = x.dtype

    def __call__(self, a: dict[str, Any], results: list[Any]) -> list[Expected | None]:
        x = a[self.name]
        if x.is_meta:
            return [Expected(x, x.dtype)]
        dtype = self.dtype if x.dtype == torch.float64 else x.dtype
        try:
            return [Expected(self._expected(a, x), dtype)]
        except _UnreadError:
            if not x.is_cuda:
                raise
            return [Expected(x.to("meta"), dtype)]

    def _expected(self, a: dict[str, Any], x: Tensor) -> Tensor:
        positions, length = _check_positions(a, x), a["cos"].shape[0]
        assert a["cos"].shape == a["sin"].shape
        if positions.numel() and not -1 <= positions.min() <= positions.max() < length:
            raise _UnreadError("positions")
        if length == 0 or x.numel() == 0:
            return x.double()
        options = {n: value for n, value in a.items() if n not in (self.name, "inplace")}
        if options.get("seqlen_offsets", 0) is None:
            del options["seqlen_offsets"]
        if options.get("num_heads_q") is not None:
            options["num_heads_q"] = int(options["num_heads_q"])
        return _REFERENCES[self.name](x, **options, compute_dtype=torch.float64)


# Kept from call to call, with the tables that those before have made.
_MODULES = [rotary.RotaryEmbedding(4, scale_base=scale_base) for scale_base in (None, 16.0)]


def _embed(qkv: Tensor, module: int, **where: Any) -> Any:
    return _MODULES[module](qkv, **where)


def _embed_reference(a: dict[str, Any], results: list[Any]) -> list[Expected | None]:
    """By tables of the length that this call needs."""
    a = {"position_ids": None, "cu_seqlens": None, "seqlen_offset": 0} | a
    a["seqlen_offsets"] = a["seqlen_offset"]
    positions = _check_positions(a, a["qkv"])
    length = int(positions.max()) + 1 if positions.numel() else 0
    scale_base = _MODULES[a["module"]].scale_base
    tables = make_tables(4, 10000.0, scale_base, RotaryScaling(), length, DEVICE)
    given = ("qkv", "seqlen_offsets", "position_ids", "cu_seqlens")
    a = {name: a[name] for name in given} | tables._asdict()
    return _Reference("qkv", a["qkv"])(a, results)


def _draw_embed(rng: random.Random) -> Call:
    """A call of a module, well-formed, with max_seqlen as an upper bound."""
    arguments, tokens, table = _draw_shape(rng)
    arguments["seqlen_offset"] = arguments.pop("seqlen_offsets", 0)
    on_host = DEVICE.type == "cpu" or isinstance(arguments["seqlen_offset"], int)
    if arguments.get("position_ids") is not None and DEVICE.type != "cpu":
        on_host = False
    arguments["max_seqlen"] = upper_bound(rng, table) if on_host else table
    shape = (*tokens, 3, rng.choice((1, 2)), rng.choice((4, 6, 16)))
    arguments["qkv"] = torch.randn(shape).to(DEVICE, rng.choice(FLOATS))
    arguments["module"] = rng.randrange(2)
    return Call(_embed, arguments, _embed_reference)


def _where(rng: random.Random, batch: int, length: int, table: int) -> dict[str, Any]:
    """Positions in one of the ways to give them, within the table."""
    room = table - length
    kind = rng.randrange(4)
    dtype = rng.choice((torch.int32, torch.int64))
    if kind == 0:
        return {"seqlen_offsets": rng.randint(0, room)}
    if kind == 1:
        offsets = [rng.randint(0, room) for _ in range(batch)]
        return {"seqlen_offsets": torch.tensor(offsets, dtype=dtype, device=DEVICE)}
    if kind == 2:
        shape = rng.choice(((batch, length), (1, length), (length,)))
        return {"position_ids": torch.randint(0, table, shape, dtype=dtype, device=DEVICE)}
    return {}


def _draw_shape(rng: random.Random) -> tuple[dict[str, Any], tuple[int, ...], int]:
    """Keyword arguments of positions, the tokens' dimensions, and the length of the tables."""
    batch, length = rng.choice((1, 2, 3)), rng.choice((1, 2, 5))
    if rng.random() < 0.6:
        table = length + rng.choice((0, 3))
        return _where(rng, batch, length, table) | {"cu_seqlens": None}, (batch, length), table
    lengths = [rng.randrange(4) for _ in range(batch)]
    bounds = [sum(lengths[:i]) for i in range(batch + 1)]
    dtype = rng.choice((torch.int32, torch.int64))
    arguments: dict[str, Any] = {"cu_seqlens": torch.tensor(bounds, dtype=dtype, device=DEVICE)}
    if rng.random() < 0.5:
        arguments["max_seqlen"] = upper_bound(rng, max(lengths))
    return arguments, (bounds[-1] + rng.choice((0, 0, 2)),), 4


def draw(rng: random.Random) -> Call:
    if rng.random() < 0.2:
        return _draw_embed(rng)
    arguments, tokens, table = _draw_shape(rng)
    dim = rng.choice((2, 4, 6, 16, 20))
    half = rng.randint(1, dim // 2)
    dtype = rng.choice(FLOATS)
    table_dtype = rng.choice((torch.float32, dtype))

    def angles() -> Tensor:
        return tensor(rng, (table, half), table_dtype).clamp(-1, 1)

    arguments |= {"cos": angles(), "sin": angles(), "interleaved": rng.random() < 0.5}
    heads = rng.choice((1, 2, 3))
    kind = rng.randrange(3)
    x = torch.randn(*tokens, *((), (3,), (2,))[kind], heads, dim).to(DEVICE, dtype)
    if kind == 0:
        arguments["inplace"] = rng.random() < 0.4
        if not arguments["inplace"]:
            x = tensor(rng, x.shape, dtype)
        grad = not arguments["inplace"] and rng.random() < 0.7
        arguments["x"] = x.requires_grad_() if grad else x
        return spoiled(rng, Call(rotary.apply_rotary_emb, arguments, _Reference("x", x)))
    if kind == 2:
        arguments["kv"] = x
        return spoiled(rng, Call(rotary.apply_rotary_emb_kv_, arguments, _Reference("kv", x)))
    own = rng.random() < 0.4
    arguments |= {"cos_k": angles() if own else None, "sin_k": angles() if own else None}
    arguments["num_heads_q"] = None
    if rng.random() < 0.5:
        groups = rng.choice((1, 2))
        x = torch.randn(*tokens, heads * groups + 2 * heads, dim).to(DEVICE, dtype)
        arguments["num_heads_q"] = heads * groups
    arguments["qkv"] = x
    return spoiled(rng, Call(rotary.apply_rotary_emb_qkv_, arguments, _Reference("qkv", x)))
