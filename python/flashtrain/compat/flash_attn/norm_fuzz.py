"""Random calls of the forms of the norms that stand here; see flashtrain.testing.fuzz."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from flashtrain.compat.flash_attn.ops import layer_norm as ln
from flashtrain.compat.flash_attn.ops import rms_norm
from flashtrain.compat.flash_attn.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn
from flashtrain.ops.layer_norm.fuzz import Drawer, Reference, draw_of
from flashtrain.testing.devices import DEVICE
from flashtrain.testing.fuzz import FLOATS, Call, Expected


def _parallel(d: Drawer) -> tuple[dict[str, Any], Any]:
    second = d.flag()
    arguments = {
        "x0": d.rows(), "x1": d.maybe(d.rows()), "residual": d.residual(), "weight0": d.columns(),
        "bias0": d.maybe(d.columns()), "weight1": d.columns() if second else None,
        "bias1": d.maybe(d.columns()) if second else None, "epsilon": d.epsilon(),
        "prenorm": d.flag(), "residual_in_fp32": d.flag(),
    }  # fmt: skip
    functions = (
        ln.dropout_add_layer_norm_parallel_residual,
        rms_norm.dropout_add_rms_norm_parallel_residual,
    )
    return arguments | d.dropout(), functions


def _fn(d: Drawer) -> tuple[dict[str, Any], Any]:
    second = d.flag()
    arguments = {
        "x": d.rows(), "weight": d.columns(), "bias": d.maybe(d.columns()),
        "residual": d.residual(), "x1": d.maybe(d.rows()),
        "weight1": d.columns() if second else None,
        "bias1": d.maybe(d.columns()) if second else None, "eps": d.epsilon(),
        "prenorm": d.flag(), "residual_in_fp32": d.flag(), "zero_centered_weight": d.flag(),
        "out_dtype": d.maybe(d.rng.choice(FLOATS), 0.3),
    }  # fmt: skip
    return arguments | d.dropout(), (layer_norm_fn, rms_norm_fn)


def _subset(d: Drawer) -> tuple[dict[str, Any], Any]:
    """Subsets of the rows of a matrix."""
    rows = d.rng.choice((0, 1, 2, 4, 6))
    d.shape = (rows, d.shape[-1])

    def numbers() -> tuple[Tensor | None, int]:
        if d.rng.random() < 0.3:
            return None, rows
        count = d.rng.randrange(rows + 1)
        order = [*range(1, count + 1), *[0] * (rows - count)]
        d.rng.shuffle(order)
        dtype = d.rng.choice((torch.int32, torch.int64))
        return torch.tensor(order, dtype=dtype, device=DEVICE), count

    residual = d.residual()
    x0_subset, x0_rows = numbers()
    out_subset, out_rows = numbers()
    d.shape = (x0_rows, d.shape[-1])
    arguments = {
        "x0": d.rows(), "residual": residual, "weight": d.columns(),
        "bias": d.maybe(d.columns()), "epsilon": d.epsilon(), "layerscale": d.maybe(d.columns()),
        "x0_subset": x0_subset, "out_subset": out_subset,
        "rowscale_const": d.rng.choice((1.0, 2.0)), "out_numrows": out_rows, "prenorm": d.flag(),
        "residual_in_fp32": d.flag(),
    }  # fmt: skip
    return (
        arguments | d.dropout(),
        (ln.dropout_add_layer_norm_subset, rms_norm.dropout_add_rms_norm_subset),
    )


class _SubsetReference(Reference):
    """x0 and its mask put in place row by row; then as the fused op; then the rows of z."""

    def __call__(self, a: dict, results: list[Any]) -> list[Expected | None]:
        x0, cols = a["x0"], a["x0"].shape[-1]
        with_mask, residual = a["return_dropout_mask"], a["residual"]
        mask = results[-1].reshape(-1, cols) if with_mask else torch.ones(0, cols)
        rows = x0.reshape(-1, cols) * float(a["rowscale_const"])
        numbers, targets = a["x0_subset"], a["out_subset"]
        if numbers is not None:
            sources = numbers.flatten().tolist()
            rows = self.placed(rows, sources, 0)
            mask = self.placed(mask, sources, 1) if with_mask else mask
        whole = a | {"x0": rows, "prenorm": True}
        whole["residual"] = None if residual is None else residual.reshape(-1, cols)
        z, x, *_ = super().__call__(whole, [None, None, mask])
        assert z is not None
        assert x is not None
        z_rows = z.value
        if targets is not None:
            places = targets.flatten().tolist()
            assert len(places) == z_rows.shape[0]
            count = int(a["out_numrows"])
            if sorted(n for n in places if n) == [*range(1, count + 1)]:
                z_rows = z_rows[[places.index(n + 1) for n in range(count)]]
            else:  # taken on CUDA, where nobody looks; the result is of this shape only
                assert z_rows.is_cuda
                z_rows = z_rows.new_empty((count, cols), device="meta")
        inner = x0.shape[1:]
        expected: list[Expected | None] = [
            Expected(z_rows.reshape(z_rows.numel() // inner.numel(), *inner), z.dtype)
        ]
        if a["prenorm"]:
            expected.append(
                Expected(x.value.reshape(x.value.numel() // inner.numel(), *inner), x.dtype)
            )
        if with_mask:
            expected.append(Expected(results[-1], torch.uint8))
        return expected

    @staticmethod
    def placed(rows: Tensor, sources: list[int], absent: int) -> Tensor:
        if rows.is_cuda:  # which takes them for 0
            sources = [n if 0 <= n <= rows.shape[0] else 0 for n in sources]
        assert all(0 <= n <= rows.shape[0] for n in sources)
        return torch.cat([rows.new_full((1, rows.shape[1]), absent), rows])[sources]


def draw(rng: random.Random) -> Call:
    kind = rng.choice((_parallel, _fn, _subset))
    return draw_of(rng, kind, _SubsetReference if kind is _subset else Reference)
