"""Random steps of FusedAdamW and norms of gradients; see flashtrain.testing.fuzz."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashtrain.ops import adamw
from flashtrain.ops.reference.adamw import adamw_step
from flashtrain.testing.devices import DEVICE
from flashtrain.testing.fuzz import FLOATS, Call, Expected, spoil, spoiled, tensor

_STEP = 3  # the state of the parameters is that of two steps before


def _shape(rng: random.Random) -> list[int]:
    return [rng.choice((0, 1, 2, 3, 5, 17)) for _ in range(rng.randrange(4))]


# --- Norm -----------------------------------------------------------------------------------------


def _norm(a: dict[str, Any], results: list[Any]) -> list[Expected | None]:
    grads = [grad.double() for grad in a["grads"] if grad is not None]
    assert len({grad.device for grad in grads}) <= 1
    squares = [grad.square().sum() for grad in grads]
    return [Expected(sum(squares, torch.zeros(())).sqrt(), torch.float32)]


def _draw_norm(rng: random.Random) -> Call:
    grads: list[Any] = [
        tensor(rng, _shape(rng), rng.choice(FLOATS)) for _ in range(rng.randrange(5))
    ]
    well_formed = rng.random() < 0.5
    for i in range(len(grads)):
        if rng.random() < 0.1:
            grads[i] = None
        elif not well_formed and rng.random() < 0.5:
            grads[i] = spoil(rng, grads[i])
    return Call(adamw.global_grad_norm, {"grads": grads}, _norm, well_formed)


# --- Step -----------------------------------------------------------------------------------------


def fused_adamw_step(
    params: Tensor,
    grad: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: Any,
    betas: Any,
    eps: Any,
    weight_decay: Any,
    grad_scale: Any,
    grad_norm: Any,
    max_norm: Any,
    skip: Any,
) -> list[Tensor]:
    """Step number 3 of one parameter; the parameter and its moments."""
    if not isinstance(params, Tensor):  # torch fails on a tuple, its form of a name and a tensor
        raise TypeError(f"params: got {type(params).__name__}; supported: a tensor")
    optimizer = adamw.FusedAdamW(
        [params], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, master_weights=False
    )
    if hasattr(params, "grad_dtype"):
        params.grad_dtype = None  # of any dtype
    try:
        params.grad = grad
    except (RuntimeError, TypeError) as error:  # torch's own refusal
        raise ValueError(f"grad: {error}") from error
    state = {"step": torch.tensor(_STEP - 1.0), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {0: state}, "param_groups": groups})
    try:
        optimizer.step(grad_scale=grad_scale, grad_norm=grad_norm, max_norm=max_norm, skip=skip)
    except ValueError as error:  # the extension's name for one of params
        raise ValueError(str(error).replace("param:", "params:")) from error
    state = optimizer.state[params]
    return [params.detach(), state["exp_avg"], state["exp_avg_sq"]]


def _number(value: Any, default: float) -> float:
    if value is None:
        return default
    if isinstance(value, Tensor):
        assert value.numel() == 1
        assert value.device.type == DEVICE.type
        return value.item()
    if isinstance(value, np.ndarray):  # of one number, which ops take as that
        assert value.ndim == 0
        return float(value)
    assert isinstance(value, (int, float))
    return float(value)


def _step(a: dict[str, Any], results: list[Any]) -> list[Expected | None]:
    dtype = a["params"].dtype
    param, exp_avg, exp_avg_sq = (a[name].double() for name in ("params", "exp_avg", "exp_avg_sq"))
    before = param, exp_avg, exp_avg_sq
    scale = _number(a["grad_scale"], 1.0)
    norm = _number(a["grad_norm"], 0.0)
    skipped = not math.isfinite(norm) or _number(a["skip"], 0.0) != 0.0
    if isinstance(a["grad_scale"], Tensor):
        skipped = skipped or not math.isfinite(scale) or scale == 0.0
    assert math.isfinite(_number(a["lr"], 0.0))
    assert a["max_norm"] is None or a["grad_norm"] is not None
    scale = 1.0 if skipped else scale
    unscaled = torch.tensor(norm, dtype=torch.float64) / scale
    clip = (_number(a["max_norm"], math.inf) / (unscaled + 1e-6)).clamp(max=1.0).to(DEVICE)
    if a["grad"] is not None:
        assert a["grad"].shape == param.shape == exp_avg.shape == exp_avg_sq.shape
        if not skipped:
            before = adamw_step(
                param, a["grad"].double() * clip / scale, exp_avg, exp_avg_sq, _STEP,
                lr=_number(a["lr"], 0.0), betas=a["betas"], eps=a["eps"],
                weight_decay=a["weight_decay"],
            )  # fmt: skip
    return [Expected(t, d) for t, d in zip(before, (dtype, torch.float32, torch.float32))]


def _draw_step(rng: random.Random) -> Call:
    shape, dtype = _shape(rng), rng.choice(FLOATS)
    param = torch.randn(shape).to(DEVICE, dtype)
    if len(shape) > 1 and rng.random() < 0.3:  # adjacent, in another order
        param = param.transpose(0, -1).contiguous().transpose(0, -1)
    grad_dtypes = FLOATS if hasattr(param, "grad_dtype") else (dtype,)
    norm = rng.choice((None, 0.0, 0.3, 1.0, 4.0, math.inf, math.nan))
    on_device = lambda value: torch.tensor(value, device=DEVICE)  # noqa: E731
    arguments = {
        "params": param,
        "grad": None if rng.random() < 0.1 else tensor(rng, shape, rng.choice(grad_dtypes)),
        "exp_avg": torch.randn_like(param, dtype=torch.float32),
        "exp_avg_sq": torch.rand_like(param, dtype=torch.float32) + 0.1,
        "lr": rng.choice((0.0, 1e-3, 0.5, on_device(0.1))),
        "betas": rng.choice(((0.9, 0.999), (0.0, 0.95), (0.5, 0.0))),
        "eps": rng.choice((1e-8, 1e-3, 0.5)),
        "weight_decay": rng.choice((0.0, 0.01, 0.3)),
        "grad_scale": rng.choice((None, 1.0, 3, on_device(128.0), on_device(0.0))),
        "grad_norm": None if norm is None else on_device(norm),
        "max_norm": None if norm is None else rng.choice((None, 0.5, 1.0, math.inf)),
        "skip": rng.choice((None, None, on_device(0.0), on_device(True), on_device([2]))),
    }
    return spoiled(rng, Call(fused_adamw_step, arguments, _step))


def draw(rng: random.Random) -> Call:
    return rng.choice((_draw_norm, _draw_step, _draw_step))(rng)
