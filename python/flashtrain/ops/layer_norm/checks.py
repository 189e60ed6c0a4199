"""Checks of the arguments of the norms."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashtrain.ops._arguments import FLOAT_DTYPE_NAMES, FLOAT_DTYPES, check_float, dtype_names


class Names(NamedTuple):
    """What arguments are called where they come from, for errors."""

    x0: str = "x0"
    epsilon: str = "epsilon"
    suffix: str = ""  # of weight and bias: weight0, bias0


_NAMES = Names()


class Checks:
    """Checks of x0 on construction, and of other arguments against it."""

    def __init__(
        self,
        x0: Tensor,
        dropout_p: float,
        epsilon: float,
        out_dtype: torch.dtype | None = None,
        names: Names = _NAMES,
    ) -> None:
        self.x0 = x0
        self.name = names.x0
        self._check_x0()
        if not 0.0 <= dropout_p < 1.0:
            raise ValueError(f"dropout_p: got {dropout_p}; supported: at least 0 and less than 1")
        if not epsilon >= 0.0:
            raise ValueError(f"{names.epsilon}: got {epsilon}; supported: at least 0")
        if out_dtype is not None and out_dtype not in FLOAT_DTYPES:
            raise ValueError(f"out_dtype: got {out_dtype}; supported: {FLOAT_DTYPE_NAMES}")

    def _check_x0(self) -> None:
        x0, name = self.x0, self.name
        check_float(name, x0)
        if x0.dim() == 0 or x0.shape[-1] == 0:
            raise ValueError(
                f"{name}: got shape {list(x0.shape)}; supported: [..., D] with D, the size that is "
                "normalised, at least 1"
            )

    def here(self, name: str, tensor: Tensor) -> None:
        if tensor.device != self.x0.device:
            raise ValueError(
                f"{name}: is on {tensor.device}; supported: {self.name}'s device, {self.x0.device}"
            )

    def like(self, name: str, tensor: Tensor, shape: torch.Size) -> None:
        """Of this shape, in float32 or x0's dtype, on x0's device."""
        self.here(name, tensor)
        x0 = self.x0
        if tensor.shape != shape:
            raise ValueError(
                f"{name}: got shape {list(tensor.shape)}; supported: {list(shape)}, to fit "
                f"{self.name} {list(x0.shape)}"
            )
        if tensor.dtype != x0.dtype and tensor.dtype != torch.float32:
            raise ValueError(
                f"{name}: got dtype {tensor.dtype}; supported: "
                f"{dtype_names(torch.float32, x0.dtype)}"
            )

    def columns(self, suffix: str, weight: Tensor, **vectors: Tensor | None) -> None:
        """weight and what shares its dtype, [D]; `suffix` ends their names."""
        self.like(f"weight{suffix}", weight, self.x0.shape[-1:])
        for name, vector in vectors.items():
            if vector is None:
                continue
            self.like(f"{name}{suffix}", vector, self.x0.shape[-1:])
            if vector.dtype != weight.dtype:
                raise ValueError(
                    f"{name}{suffix}: got dtype {vector.dtype}; supported: weight{suffix}'s, "
                    f"{weight.dtype}"
                )

    def rowscale(self, rowscale: Tensor) -> None:
        self.like("rowscale", rowscale, self.x0.shape[:-1])
        if rowscale.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "rowscale: requires grad, and has no gradient here; supported: a tensor that does "
                "not, rowscale.detach()"
            )
