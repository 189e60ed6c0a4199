"""Random calls of fused_dense_func and fused_mlp_func; see flashtrain.testing.fuzz."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashtrain.ops import fused_dense
from flashtrain.ops.reference import fused_dense as reference
from flashtrain.testing.fuzz import FLOATS, Call, Expected, spoiled, tensor


class _Reference:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype  # of tensors that are float64 in the arguments

    def __call__(self, a: dict[str, Any], results: list[Any]) -> list[Expected | None]:
        x = a["x"]
        dtype = self.dtype if x.dtype == torch.float64 else x.dtype
        if "weight1" not in a:
            out = reference.fused_dense(x, a["weight"], a["bias"], compute_dtype=torch.float64)
        else:
            names = ("weight1", "weight2", "bias1", "bias2", "activation")
            out = reference.fused_mlp(x, *(a[n] for n in names), compute_dtype=torch.float64)
        for name in ("bias", "bias1", "bias2"):
            assert a.get(name) is None or a[name].dim() == 1
        expected: list[Expected | None] = [Expected(out, dtype)]
        if a["return_residual"]:
            expected.append(Expected(x.double(), dtype))
        return expected


def _flag(rng: random.Random, probability: float) -> Any:
    """A truth value, of one of the types that callers pass."""
    value = rng.random() < probability
    return rng.choice((value, value, int(value), np.bool_(value)))


def draw(rng: random.Random) -> Call:
    dtype = rng.choice(FLOATS)
    rows = [rng.choice((0, 1, 2, 5)) for _ in range(rng.choice((0, 1, 1, 2)))]
    sizes = [rng.choice((1, 3, 8, 16)) for _ in range(3)]

    def draw_tensor(*shape: int, scale: float = 1.0) -> Tensor:
        values = tensor(rng, shape, dtype) * scale
        return values.requires_grad_(rng.random() < 0.7)

    def bias(size: int) -> Tensor | None:
        return draw_tensor(size) if rng.random() < 0.6 else None

    arguments: dict[str, Any] = {
        "x": draw_tensor(*rows, sizes[0]), "return_residual": _flag(rng, 0.4),
    }  # fmt: skip
    if rng.random() < 0.4:
        arguments |= {"weight": draw_tensor(sizes[1], sizes[0], scale=0.3), "bias": bias(sizes[1])}
        return spoiled(rng, Call(fused_dense.fused_dense_func, arguments, _Reference(dtype)))
    arguments |= {
        "weight1": draw_tensor(sizes[1], sizes[0], scale=0.3), "bias1": bias(sizes[1]),
        "weight2": draw_tensor(sizes[2], sizes[1], scale=0.3), "bias2": bias(sizes[2]),
        "activation": rng.choice(("gelu_approx", "sqrelu")),
        "save_pre_act": _flag(rng, 0.7), "checkpoint_lvl": np.int64(rng.randrange(3)),
        "heuristic": rng.choice((0, -1, "auto", np.int32(1), torch.tensor(2))),
    }  # fmt: skip
    return spoiled(rng, Call(fused_dense.fused_mlp_func, arguments, _Reference(dtype)))
