"""Dense layers and the two-layer MLP with fused bias, activation and bias gradients.

    dense  x weight^T + bias
    MLP    activation(x weight1^T + bias1) weight2^T + bias2

The public functions have flash-attn's names and arguments (`flash_attn.ops.fused_dense`).
docs/fused_dense.md describes numerics, cost and errors.

Dtypes: x float32, float16 or bfloat16; weights and biases x's. Under `torch.autocast` all are cast
to its dtype first, as for `torch.nn.functional.linear`.

On CUDA each product runs as cuBLASLt's with a fused epilogue or as torch's with a pass of ours,
whichever was faster when it was measured on the user's card (see `autotune.py`).

I, H and O are the sizes of the input, of the hidden layer and of the output; the leading dimensions
count as rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flashtrain.ops._arguments import check_float, checked
from flashtrain.ops._autograd import needs_autograd
from flashtrain.ops.fused_dense import gemm
from flashtrain.ops.fused_dense.kernels import (
    KEEP_ALL,
    KEEP_NOTHING,
    KEEP_PRE_ACT,
    Dense,
    Mlp,
    fused_dense_forward,
)

ACTIVATIONS = {
    "gelu_approx": gemm.GELU_APPROX,
    "relu": gemm.RELU,
    "sqrelu": gemm.SQUARED_RELU,
}


def _check_x(x: Tensor) -> None:
    check_float("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: got shape {list(x.shape)}; supported: [..., I] with I at least 1")


def _check_layer(x: Tensor, size: int, weight: Tensor, bias: Tensor | None, suffix: str) -> None:
    """`size`: of what the layer multiplies."""
    if weight.dim() != 2 or weight.shape[1] != size or weight.shape[0] == 0:
        raise ValueError(
            f"weight{suffix}: got shape {list(weight.shape)}; supported: [features, {size}], "
            f"to fit x {list(x.shape)}"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise ValueError(
                f"{name}{suffix}: got dtype {tensor.dtype}; supported: x's, {x.dtype} (or "
                "torch.autocast, which casts both)"
            )
        if tensor.device != x.device:
            raise ValueError(
                f"{name}{suffix}: is on {tensor.device}; supported: x's device, {x.device}"
            )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias{suffix}: got shape {list(bias.shape)}; supported: [{weight.shape[0]}], to fit "
            f"weight{suffix} {list(weight.shape)}"
        )


def _autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """All of them in the dtype of autocast, where that is on."""
    device_type = x.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return x, *others
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(None if t is None else t.to(dtype) for t in (x, *others))


@checked
def fused_dense_func(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    return_residual: bool = False,
) -> Any:
    """x weight^T + bias, with the gradient of the bias fused.

    Args:
      x: [..., I], float32, float16 or bfloat16.
      weight: [O, I], x's dtype.
      bias: [O], x's dtype; None: no bias.
      return_residual: also return x. Its gradient is then added in the product that computes x's,
        rather than in a pass of its own.

    Returns out [..., O], or (out, x). Non-contiguous tensors are copied. Saved for backward: x
    where weight needs a gradient, weight where x does. Only required gradients are computed.

    Raises:
      ValueError: an argument does not fit; its name, what came, what is supported.
      RuntimeError: the device reported an error.
    """
    _check_x(x)
    original = x
    x, weight, bias = _autocast(x, weight, bias)
    _check_layer(x, x.shape[-1], weight, bias, "")
    if not needs_autograd(x, weight, bias):
        out, _ = fused_dense_forward(x, weight, bias, gemm.IDENTITY, False, True)
        return (out, original) if return_residual else out
    # A residual that autocast would round stays as it is.
    fold = return_residual and x is original
    out, residual = Dense.apply(x, weight, bias, fold, True)
    return (out, residual if fold else original) if return_residual else out


@checked
def fused_mlp_func(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    activation: str = "gelu_approx",
    save_pre_act: bool = True,
    return_residual: bool = False,
    checkpoint_lvl: int = 0,
    heuristic: int | str = 0,
) -> Any:
    """activation(x weight1^T + bias1) weight2^T + bias2.

    Args:
      x: [..., I], float32, float16 or bfloat16.
      weight1: [H, I], weight2: [O, H], x's dtype.
      bias1: [H], bias2: [O], x's dtype; None: no bias.
      activation: "gelu_approx" (the tanh form), "relu" or "sqrelu" (ReLU squared).
      save_pre_act: false: backward, if there is one, recomputes as with checkpoint_lvl 2.
      return_residual: also return x; see `fused_dense_func`.
      checkpoint_lvl: saved for backward with x and the weights, each [..., H]:
        0: the activation's input and output (for ReLU its output);
        1: the activation's input, of which backward computes the output again (ReLU: as 0);
        2: nothing; backward repeats the first product.
      heuristic: -1: the plain path always. Other values, flash-attn's numbers of algorithms and
        "auto", are accepted and mean the same: what was measured to be fastest.

    Returns out [..., O], or (out, x). Only gradients that are required are computed, and only what
    they need is saved.

    Raises:
      ValueError: an argument does not fit; its name, what came, what is supported.
      RuntimeError: the device reported an error.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation: got {activation!r}; supported: {', '.join(map(repr, ACTIVATIONS))}"
        )
    if checkpoint_lvl not in (KEEP_ALL, KEEP_PRE_ACT, KEEP_NOTHING):
        raise ValueError(f"checkpoint_lvl: got {checkpoint_lvl!r}; supported: 0, 1, 2")
    if heuristic != "auto" and not (isinstance(heuristic, int) and heuristic >= -1):
        raise ValueError(
            f"heuristic: got {heuristic!r}; supported: -1 (never fused), 0 or more and 'auto' "
            "(as measured)"
        )
    _check_x(x)
    original = x
    x, weight1, weight2, bias1, bias2 = _autocast(x, weight1, weight2, bias1, bias2)
    _check_layer(x, x.shape[-1], weight1, bias1, "1")
    _check_layer(x, weight1.shape[0], weight2, bias2, "2")
    fuse, kind = heuristic != -1, ACTIVATIONS[activation]
    if not needs_autograd(x, weight1, weight2, bias1, bias2):
        act, _ = fused_dense_forward(x, weight1, bias1, kind, False, fuse)
        out, _ = fused_dense_forward(act, weight2, bias2, gemm.IDENTITY, False, fuse)
        return (out, original) if return_residual else out
    keep = checkpoint_lvl if save_pre_act else KEEP_NOTHING
    fold = return_residual and x is original
    out, residual = Mlp.apply(x, weight1, bias1, weight2, bias2, kind, keep, fold, fuse)
    return (out, residual if fold else original) if return_residual else out


# --- Modules --------------------------------------------------------------------------------------


class FusedDense(nn.Linear):
    """`torch.nn.Linear` through `fused_dense_func`; the parameters have the same names.

    Args:
      in_features: I.
      out_features: O.
      bias: whether there is one.
      return_residual: return (out, x) rather than out.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        return_residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.return_residual = return_residual

    def forward(self, x: Tensor) -> Any:
        return fused_dense_func(x, self.weight, self.bias, self.return_residual)


class FusedMLP(nn.Module):
    """fc2(activation(fc1(x))) with fc1 and fc2 as `torch.nn.Linear` has them.

    Args:
      in_features: I.
      hidden_features: H; None: 4 I.
      out_features: O; None: I.
      bias1, bias2: whether there are biases.
      activation, return_residual, checkpoint_lvl, heuristic: as for `fused_mlp_func`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        bias1: bool = True,
        bias2: bool = True,
        activation: str = "gelu_approx",
        return_residual: bool = False,
        checkpoint_lvl: int = 0,
        heuristic: int | str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_features = 4 * in_features if hidden_features is None else hidden_features
        out_features = in_features if out_features is None else out_features
        self.activation = activation
        self.return_residual = return_residual
        self.checkpoint_lvl = checkpoint_lvl
        self.heuristic = heuristic
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias1, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Any:
        return fused_mlp_func(
            x,
            self.fc1.weight,
            self.fc2.weight,
            self.fc1.bias,
            self.fc2.bias,
            activation=self.activation,
            return_residual=self.return_residual,
            checkpoint_lvl=self.checkpoint_lvl,
            heuristic=self.heuristic,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, checkpoint_lvl={self.checkpoint_lvl}"
