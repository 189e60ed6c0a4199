"""Random calls of cross_entropy_loss; see flashtrain.testing.fuzz."""

from __future__ import annotations

import random
from typing import Any

import torch

from flashtrain.ops.cross_entropy import cross_entropy_loss
from flashtrain.ops.reference import cross_entropy as reference
from flashtrain.testing.devices import DEVICE
from flashtrain.testing.fuzz import FLOATS, Call, Expected, spoiled, tensor


def _reference(a: dict[str, Any], results: list[Any]) -> list[Expected | None]:
    # torch compares int32 with a larger number's low bits.
    logits, labels = a["logits"], a["labels"].long()
    assert labels.shape == logits.shape[:-1]
    assert labels.device == logits.device
    if logits.is_meta:
        return [Expected(labels, torch.float32)] * 2
    classes = logits.shape[-1] if a["vocab_size"] is None else a["vocab_size"]
    known = (labels >= 0) & (labels < classes)
    if logits.is_cuda:  # which does not look: such rows are NaN
        judged = bool((known | (labels == a["ignore_index"])).all())
    else:
        assert (known | (labels == a["ignore_index"])).all()
        judged = True
    if not judged or not 1e-3 < a["logit_scale"] < 1e3 or not a["lse_square_scale"] < 1e3:
        return [Expected(labels.to("meta"), torch.float32)] * 2
    known_lse = a.get("precomputed_lse")
    if known_lse is not None:  # it is taken at its word
        lse = logits[..., :classes].double().logsumexp(-1)
        if not torch.allclose(known_lse.double(), lse, rtol=1e-2, atol=1e-2):
            return [Expected(labels.to("meta"), torch.float32)] * 2
    options = ("label_smoothing", "logit_scale", "lse_square_scale", "ignore_index", "vocab_size")
    losses, z_losses = reference.cross_entropy_loss(
        logits, labels, **{name: a[name] for name in options}, compute_dtype=torch.float64
    )
    return [Expected(losses, torch.float32), Expected(z_losses, torch.float32)]


def draw(rng: random.Random) -> Call:
    shape = [rng.choice((0, 1, 2, 5)) for _ in range(rng.choice((0, 1, 1, 2)))]
    columns = rng.choice((1, 2, 7, 16, 33))
    classes = rng.choice((columns, rng.randint(1, columns)))
    logits = tensor(rng, (*shape, columns), rng.choice(FLOATS), rng.random() < 0.7)
    inplace = rng.random() < 0.3
    if inplace:  # rows that overlap cannot be written to
        logits = logits.detach().contiguous().requires_grad_(logits.requires_grad)
    ignore_index = rng.choice((-100, -1, 0))
    labels = torch.randint(0, classes, tuple(shape), device=DEVICE)
    labels = labels.masked_fill(torch.rand(tuple(shape), device=DEVICE) < 0.2, ignore_index)
    if rng.random() < 0.1 and labels.numel() > 0:
        labels = labels.fill_(rng.choice((-2, columns, 2**31 - 1)))  # malformed
    well_formed = bool(((labels >= 0) & (labels < classes) | (labels == ignore_index)).all())
    arguments = {
        "logits": logits,
        "labels": labels.to(rng.choice((torch.int64, torch.int32))),
        "label_smoothing": rng.choice((0.0, 0.0, 0.1, 0.9)),
        "logit_scale": rng.choice((1.0, 1.0, 0.5)),
        "lse_square_scale": rng.choice((0.0, 0.0, 0.01)),
        "ignore_index": ignore_index,
        "inplace_backward": inplace,
        "vocab_size": rng.choice((None, classes)) if classes == columns else classes,
    }
    if rng.random() < 0.3:
        arguments["precomputed_lse"] = logits.detach()[..., :classes].float().logsumexp(-1)
    call = Call(cross_entropy_loss, arguments, _reference, well_formed)
    return spoiled(rng, call)
