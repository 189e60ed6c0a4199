"""The perceptrons of a transformer block.

Legend: B batch, T sequence, D model width, F hidden width (usually 4 D).
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashtrain.errors import did_you_mean


def _gelu_approx(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _squared_relu(x: Tensor) -> Tensor:
    return torch.square(F.relu(x))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_approx": _gelu_approx,  # GPT-2's tanh approximation
    "relu": F.relu,
    "sqrelu": _squared_relu,
}

_FUSED_ACTIVATIONS = ("gelu_approx", "relu", "sqrelu")

# Of the gate of a gated MLP (Shazeer 2020, https://arxiv.org/abs/2002.05202).
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "glu": torch.sigmoid,
    "geglu": F.gelu,
    "swiglu": F.silu,
}


def build_mlp(d_model: int, d_ff: int, activation: str, *, fused: bool) -> nn.Module:
    """An `Mlp`, or for the activations of `GATES` a `GatedMlp`."""
    if activation in GATES:
        return GatedMlp(d_model, d_ff, activation=activation)
    return Mlp(d_model, d_ff, activation=activation, fused=fused)


def _check_activation(activation: str, known: Iterable[str]) -> None:
    if activation not in known:
        raise ValueError(f"activation={activation!r} is unknown; {did_you_mean(activation, known)}")


class Mlp(nn.Module):
    """fc2(activation(fc1(x))).

    Args:
        d_model: D.
        d_ff: F.
        activation: one of `ACTIVATIONS`.
        bias: of both layers.
        fused: use the kernels of `flashtrain.ops.fused_dense` where they have the activation.

    Raises:
        ValueError: the activation is not one of `ACTIVATIONS`.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        activation: str = "gelu_approx",
        bias: bool = True,
        fused: bool = True,
    ):
        super().__init__()
        _check_activation(activation, ACTIVATIONS)
        self.activation = activation
        self.fc1 = nn.Linear(d_model, d_ff, bias=bias)
        self.fc2 = nn.Linear(d_ff, d_model, bias=bias)
        self._fused_mlp: Callable[..., Tensor] | None = None
        if fused and activation in _FUSED_ACTIVATIONS:
            # Imported on demand: the plain model needs no compiled extension.
            from flashtrain.ops.fused_dense import fused_mlp_func

            self._fused_mlp = fused_mlp_func

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        fc1, fc2 = self.fc1, self.fc2
        if self._fused_mlp is None:
            return fc2(ACTIVATIONS[self.activation](fc1(x_BTD)))
        return self._fused_mlp(
            x_BTD, fc1.weight, fc2.weight, fc1.bias, fc2.bias, activation=self.activation
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation}, fused={self._fused_mlp is not None}"


class GatedMlp(nn.Module):
    """fc2(y * activation(gate)) with (y, gate) the halves of fc1(x).

    Args:
        d_model: D.
        d_ff: F, the width of y.
        activation: one of `GATES`.
        bias: of both layers.

    Raises:
        ValueError: the activation is not one of `GATES`.
    """

    def __init__(self, d_model: int, d_ff: int, *, activation: str = "swiglu", bias: bool = True):
        super().__init__()
        _check_activation(activation, GATES)
        self.activation = activation
        self.fc1 = nn.Linear(d_model, 2 * d_ff, bias=bias)
        self.fc2 = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        y_BTF, gate_BTF = self.fc1(x_BTD).chunk(2, dim=-1)
        return self.fc2(y_BTF * GATES[self.activation](gate_BTF))

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
