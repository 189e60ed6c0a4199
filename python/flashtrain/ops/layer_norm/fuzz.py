"""Random calls of every public function of layer_norm; see flashtrain.testing.fuzz.

flash-attn's other forms are called by flashtrain.compat.flash_attn.norm_fuzz.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flashtrain.ops import layer_norm as ln
from flashtrain.testing.fuzz import FLOATS, Call, Expected, spoiled, tensor


def _like(shape: Sequence[int], value: Tensor | None, *, device_of: Tensor) -> Tensor | None:
    """The argument in float64; what does not fit exactly is refused, not broadcast."""
    if value is None:
        return None
    assert value.shape == torch.Size(shape), value.shape
    assert value.device == device_of.device
    assert value.is_floating_point()
    return value.double()


def _round(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded, with the gradient of the number before."""
    return x + (x.detach().to(dtype).double() - x.detach())


def _norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, rms: bool, centered: bool
) -> Tensor:
    weight = _like(x.shape[-1:], weight, device_of=x)
    bias = _like(x.shape[-1:], bias, device_of=x)
    mean = 0.0 if rms else x.mean(-1, keepdim=True)
    rstd = ((x - mean).square().mean(-1, keepdim=True) + epsilon).rsqrt()
    z = (x - mean) * rstd * (weight + bool(centered))
    return z if bias is None else z + bias


class Reference:
    """What a function should return for its arguments, dtypes from the op's own tensors."""

    def __init__(self, rms: bool, dtypes: dict[str, torch.dtype]) -> None:
        self.rms = rms
        self.dtypes = dtypes  # of the tensors that are float64 in `arguments`

    def dtype(self, name: str, value: Tensor) -> torch.dtype:
        return self.dtypes[name] if value.dtype == torch.float64 else value.dtype

    def sum(self, a: dict, branches: list[tuple[str, Tensor | None]], masks: list) -> Tensor:
        """x in float64, rounded to its dtype."""
        x0 = a[branches[0][0]]
        p = a.get("dropout_p", 0.0)
        residual = a.get("residual")
        total = _like(x0.shape, residual, device_of=x0)
        for (name, branch), mask in zip(branches, masks):
            if branch is None:
                continue
            x = _like(x0.shape, a[name], device_of=x0)
            rowscale = _like(x0.shape[:-1], a.get("rowscale"), device_of=x0)
            if rowscale is not None:
                x = x * rowscale.unsqueeze(-1)
            if p > 0.0:
                x = x * mask.bool() / (1.0 - p)
            layerscale = _like(x0.shape[-1:], a.get("layerscale"), device_of=x0)
            if layerscale is not None:
                x = x * layerscale
            total = x if total is None else total + x
        assert total is not None
        return total

    def x_dtype(self, a: dict, first: str) -> torch.dtype:
        if a.get("residual") is not None:
            return self.dtype("residual", a["residual"])
        return torch.float32 if a.get("residual_in_fp32") else self.dtype(first, a[first])

    def __call__(self, a: dict, results: list[Any]) -> list[Expected | None]:
        first = "x" if "x" in a else "x0"
        names = [first, "x1"] if "x1" in a else [first]
        suffix = "0" if "weight0" in a else ""
        p, want_masks = a.get("dropout_p", 0.0), a.get("return_dropout_mask", False)
        as_fn = "eps" in a and "zero_centered_weight" in a
        epsilon = a["eps"] if as_fn else a["epsilon"]
        branches = [(name, a[name]) for name in names]
        masks = results[-len(names) :] if want_masks else [None] * len(names)
        x_dtype = self.x_dtype(a, first)
        # Not where the mask is unknown, nor where float32 overflows and float64 does not.
        judged = bool(
            (not p > 0.0 or want_masks)
            and 1e-7 <= epsilon < 1e9
            and abs(a.get("rowscale_const", 1.0)) < 1e9
        )
        x = _round(self.sum(a, branches, masks), x_dtype) if judged else a[first].double()
        rms = self.rms or bool(a.get("is_rms_norm"))
        centered = a.get("zero_centered_weight", False)
        z_dtype = a.get("out_dtype") or self.dtype(first, a[first])
        expected: list[Expected | None] = []
        for s in (suffix, "1"):
            weight, bias = a.get(f"weight{s}"), a.get(f"bias{s}")
            if weight is not None:
                z = _norm(x, weight, bias, float(epsilon), rms, centered)
                expected.append(Expected(z, z_dtype))
            elif "x1" in a and not as_fn:
                expected.append(None)
        if a.get("prenorm"):
            expected.append(Expected(x, x_dtype))
        if want_masks:
            expected += [
                self.mask(a, branch, got, as_fn) for (_, branch), got in zip(branches, masks)
            ]
        if not judged:
            expected = [e and Expected(e.value.to("meta"), e.dtype) for e in expected]
        return expected

    def mask(self, a: dict, branch: Tensor | None, got: Any, as_fn: bool) -> Expected | None:
        """Which elements are kept is the op's to say; the rest is not."""
        dropped = a["dropout_p"] > 0.0 and branch is not None
        if as_fn:
            return Expected(got, torch.bool) if dropped else None
        assert (got <= 1).all()
        assert dropped or (got == 1).all()
        return Expected(got, torch.uint8)


def _shape(rng: random.Random) -> tuple[int, ...]:
    # Not 2 to 4: nearly equal numbers are too likely there, and rstd multiplies their rounding.
    cols = rng.choice((1, 5, 7, 8, 16, 24, 33))
    return (*(rng.choice((0, 1, 2, 3, 5)) for _ in range(rng.choice((0, 1, 1, 1, 2)))), cols)


class Drawer:
    """Draws the tensors of a call: one dtype for x0, one for the weights."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.shape = _shape(rng)
        self.dtype = rng.choice(FLOATS)
        self.weight_dtype = rng.choice((self.dtype, torch.float32))

    def maybe(self, value: Any, share: float = 0.5) -> Any:
        return value if self.rng.random() < share else None

    def rows(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = self.dtype if dtype is None else dtype
        return tensor(self.rng, self.shape, dtype, self.rng.random() < 0.7)

    def residual(self) -> Tensor | None:
        return self.maybe(self.rows(self.rng.choice((self.dtype, torch.float32))))

    def columns(self) -> Tensor:
        return tensor(self.rng, self.shape[-1:], self.weight_dtype, self.rng.random() < 0.7)

    def flag(self) -> bool:
        return self.rng.random() < 0.5

    def dropout(self) -> dict[str, Any]:
        p = self.rng.choice((0.0, 0.0, 0.1, 0.5, 0.9))
        return {"dropout_p": p, "return_dropout_mask": p > 0.0 or self.flag()}

    def epsilon(self) -> float:
        return self.rng.choice((1e-5, 1e-3, 1))


def _fused(d: Drawer) -> tuple[dict[str, Any], Any]:
    arguments = {
        "x0": d.rows(), "residual": d.residual(), "weight": d.columns(),
        "bias": d.maybe(d.columns()), "epsilon": d.epsilon(),
        "rowscale": d.maybe(tensor(d.rng, d.shape[:-1], d.dtype), 0.2),
        "layerscale": d.maybe(d.columns(), 0.2), "prenorm": d.flag(), "residual_in_fp32": d.flag(),
    }  # fmt: skip
    return arguments | d.dropout(), (ln.dropout_add_layer_norm, ln.dropout_add_rms_norm)


def _plain(d: Drawer) -> tuple[dict[str, Any], Any]:
    arguments = {"x": d.rows(), "weight": d.columns(), "epsilon": d.epsilon()}
    if d.flag():
        return arguments, (None, ln.rms_norm)
    return arguments | {"bias": d.maybe(d.columns())}, (ln.layer_norm, None)


Kind = Callable[[Drawer], tuple[dict[str, Any], Any]]


def draw_of(rng: random.Random, kind: Kind, reference: type[Reference] = Reference) -> Call:
    arguments, functions = kind(Drawer(rng))
    rms = functions[0] is None or (functions[1] is not None and rng.random() < 0.5)
    dtypes = {n: v.dtype for n, v in arguments.items() if isinstance(v, Tensor)}
    return spoiled(rng, Call(functions[rms], arguments, reference(rms, dtypes)))


def draw(rng: random.Random) -> Call:
    return draw_of(rng, rng.choice((_fused, _fused, _plain)))
