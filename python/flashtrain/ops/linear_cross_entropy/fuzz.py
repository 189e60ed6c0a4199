"""Random calls of linear_cross_entropy; see flashtrain.testing.fuzz."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from flashtrain.ops.linear_cross_entropy import linear_cross_entropy
from flashtrain.ops.reference import cross_entropy as reference
from flashtrain.testing.devices import DEVICE
from flashtrain.testing.fuzz import FLOATS, Call, Expected, spoiled, tensor


def _reference(a: dict[str, Any], results: list[Any]) -> Sequence[Expected | None]:
    # torch compares int32 with a larger number's low bits.
    a = a | {"labels": a["labels"].long()}
    hidden, weight, labels = a["hidden"], a["weight"], a["labels"]
    assert labels.shape == hidden.shape[:-1]
    assert labels.device == hidden.device == weight.device
    shape = labels if a["reduction"] == "none" else torch.empty(())
    count = 2 if a["return_z_loss"] else 1
    anything = [Expected(shape.to("meta"), torch.float32)] * count
    if hidden.is_meta:
        return anything
    classes = weight.shape[0] if a["vocab_size"] is None else a["vocab_size"]
    known = (labels >= 0) & (labels < classes) | (labels == a["ignore_index"])
    if not known.all():
        assert hidden.is_cuda  # which does not look: such rows are NaN
        return anything
    if not 1e-3 < a["logit_scale"] < 1e3 or not a["lse_square_scale"] < 1e3:
        return anything
    losses = reference.linear_cross_entropy(
        **{name: value for name, value in a.items() if name != "return_z_loss"},
        compute_dtype=torch.float64,
    )
    return [Expected(value, torch.float32) for value in losses[:count]]


def draw(rng: random.Random) -> Call:
    shape = [rng.choice((0, 1, 2, 5)) for _ in range(rng.choice((0, 1, 1, 2)))]
    width, rows = rng.choice((1, 3, 8)), rng.choice((1, 2, 7, 16, 33))
    classes = rng.choice((rows, rng.randint(1, rows)))
    dtype = rng.choice(FLOATS)
    of_parameters = rng.choice((dtype, torch.float32))
    reduction = rng.choice(("mean", "mean", "sum", "none"))

    def draw_tensor(*shape: int, dtype: torch.dtype = of_parameters) -> torch.Tensor:
        return tensor(rng, shape, dtype, reduction != "none" and rng.random() < 0.6)

    ignore_index = rng.choice((-100, -1, 0))
    labels = torch.randint(0, classes, tuple(shape), device=DEVICE)
    labels = labels.masked_fill(torch.rand(tuple(shape), device=DEVICE) < 0.2, ignore_index)
    if rng.random() < 0.1 and labels.numel() > 0:
        labels = labels.fill_(rng.choice((-2, rows, 2**31 - 1)))  # malformed
    well_formed = bool(((labels >= 0) & (labels < classes) | (labels == ignore_index)).all())
    arguments = {
        "hidden": draw_tensor(*shape, width, dtype=dtype),
        "weight": draw_tensor(rows, width),
        "labels": labels.to(rng.choice((torch.int64, torch.int32))),
        "bias": draw_tensor(rows) if rng.random() < 0.4 else None,
        "label_smoothing": rng.choice((0.0, 0.0, 0.1, 0.9)),
        "logit_scale": rng.choice((1.0, 1.0, 0.5)),
        "lse_square_scale": rng.choice((0.0, 0.0, 0.01)),
        "ignore_index": ignore_index,
        "reduction": reduction,
        "vocab_size": rng.choice((None, classes)) if classes == rows else classes,
        "return_z_loss": rng.random() < 0.5,
    }
    return spoiled(rng, Call(linear_cross_entropy, arguments, _reference, well_formed))
