"""The two-layer perceptron of a transformer block.

Legend: B batch, T sequence, D model width, F hidden width (usually 4 D).
"""

from collections.abc import Callable

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


class Mlp(nn.Module):
    """fc2(activation(fc1(x))).

    Raises:
        ValueError: the activation is not one of `ACTIVATIONS`.
    """

    def __init__(self, d_model: int, d_ff: int, *, activation: str = "gelu_approx"):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation={activation!r} is unknown; {did_you_mean(activation, ACTIVATIONS)}"
            )
        self.activation = activation
        self.fc1 = nn.Linear(d_model, d_ff)
        self.fc2 = nn.Linear(d_ff, d_model)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x_BTD)))
