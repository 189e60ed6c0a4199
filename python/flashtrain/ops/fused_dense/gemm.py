"""The three products of a dense layer, each by torch and our passes ("plain") or by cuBLASLt.

    forward          out = activation(x weight^T + bias), and pre_act where wanted
    input gradient   dx = (dout weight) * activation'(pre_act), and its sum over rows
    weight gradient  dweight = dout^T x, and the sum of dout over rows

x is [rows, in_features], weight [out_features, in_features], dout [rows, out_features]; all are
contiguous and of one dtype.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtrain import _kernels
from flashtrain.ops._library import launch_context, to_kernel

# DenseMatmul and Activation of cc/fused_dense/fused_dense.h.
FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = 0, 1, 2
IDENTITY, GELU_APPROX, RELU, SQUARED_RELU = 0, 1, 2, 3
MATMUL_NAMES = ("forward", "input_gradient", "weight_gradient")
ACTIVATION_NAMES = ("identity", "gelu_approx", "relu", "sqrelu")


class _Arguments(NamedTuple):
    """What dense_matmul and its kin have in common, in their order."""

    matmul: int
    left: Any
    right: Any
    out: Any
    bias: Any
    pre_act: Any
    dbias: Any
    activation: int
    allow_tf32: bool


class Algorithm(NamedTuple):
    """A way in which cuBLASLt computes one product."""

    data: bytes
    workspace_bytes: int
    sums: bool  # dbias is the epilogue's, not a pass of its own


class Product(NamedTuple):
    """All that the speed of a product depends on."""

    matmul: int
    rows: int
    in_features: int
    out_features: int
    dtype: torch.dtype
    device: torch.device
    allow_tf32: bool
    activation: int = IDENTITY
    bias: bool = False  # forward: whether there is one
    pre_act: bool = False  # forward: whether it is written
    dbias: bool = False  # gradients: whether it is written

    def name(self) -> str:
        words = [
            MATMUL_NAMES[self.matmul],
            f"{self.rows}x{self.in_features}x{self.out_features}",
            str(self.dtype).removeprefix("torch."),
            ACTIVATION_NAMES[self.activation],
        ]
        flags = ("allow_tf32", "bias", "pre_act", "dbias")
        return " ".join(words + [flag for flag in flags if getattr(self, flag)])


class Operands(NamedTuple):
    """Inputs of a product. left: x or dout; right: weight or x."""

    left: Tensor
    right: Tensor
    bias: Tensor | None = None
    pre_act: Tensor | None = None  # input gradient with an activation: an input


class Results(NamedTuple):
    out: Tensor
    pre_act: Tensor | None = None
    dbias: Tensor | None = None


def allows_tf32(dtype: torch.dtype) -> bool:
    """Whether torch would multiply float32 matrices in TF32 on CUDA."""
    if dtype != torch.float32:
        return False
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32


def _allocator(like: Tensor):
    return lambda size: to_kernel(like.new_empty((size,), dtype=torch.uint8))


def _kernel(tensor: Tensor | None) -> object:
    return None if tensor is None else to_kernel(tensor)


def activate(x: Tensor, bias: Tensor | None, activation: int, pre_act: Tensor | None) -> Tensor:
    """activation(x + bias), rounded between the two; pre_act, which may be x, gets x + bias."""
    out = torch.empty_like(x)
    _kernels.dense_activation_forward(
        to_kernel(x),
        _kernel(bias),
        activation,
        _kernel(pre_act),
        to_kernel(out),
        launch_context(x),
    )
    return out


def activate_backward_(
    dout: Tensor, pre_act: Tensor | None, activation: int, with_dbias: bool
) -> Tensor | None:
    """dout *= activation'(pre_act), in place; returns the sum over rows where wanted.

    Nothing is written to dout if the activation is IDENTITY.
    """
    dbias = dout.new_empty(dout.shape[-1:]) if with_dbias else None
    _kernels.dense_activation_backward(
        to_kernel(dout),
        _kernel(pre_act),
        activation,
        None if activation == IDENTITY else to_kernel(dout),
        _kernel(dbias),
        _allocator(dout),
        launch_context(dout),
    )
    return dbias


def _plain_forward(product: Product, operands: Operands) -> Results:
    x, weight, bias, _ = operands
    if product.activation == IDENTITY:
        return Results(torch.nn.functional.linear(x, weight, bias))
    # Low precision: the bias is added before the product is rounded. On the CPU in float32 nothing
    # is rounded, and our pass adds it for less than torch does.
    late_bias = bias if x.is_cpu and x.dtype == torch.float32 else None
    pre_act = torch.nn.functional.linear(x, weight, None if late_bias is not None else bias)
    kept = pre_act if product.pre_act else None
    out = activate(pre_act, late_bias, product.activation, kept)
    return Results(out, kept)


def run_plain(product: Product, operands: Operands) -> Results:
    """By torch's product and our passes. The tensors are [rows, features]."""
    if product.matmul == FORWARD:
        return _plain_forward(product, operands)
    dout, right, _, pre_act = operands
    if product.matmul == INPUT_GRADIENT:
        dx, dbias = dout @ right, None
        if product.activation != IDENTITY or product.dbias:
            dbias = activate_backward_(dx, pre_act, product.activation, product.dbias)
        return Results(dx, dbias=dbias)
    dbias = activate_backward_(dout, None, IDENTITY, True) if product.dbias else None
    return Results(dout.t() @ right, dbias=dbias)


def _fused_results(product: Product, operands: Operands, sums: bool) -> Results:
    """Unwritten; dbias only where the epilogue is to write it."""
    left, right = operands.left, operands.right
    if product.matmul == WEIGHT_GRADIENT:
        out = left.new_empty((product.out_features, product.in_features))
    else:
        features = product.out_features if product.matmul == FORWARD else product.in_features
        out = left.new_empty((product.rows, features))
    pre_act = torch.empty_like(out) if product.pre_act else None
    dbias = None
    if product.dbias and sums:
        weight_gradient = product.matmul == WEIGHT_GRADIENT
        features = product.out_features if weight_gradient else product.in_features
        dbias = right.new_empty((features,))
    return Results(out, pre_act, dbias)


def _arguments(product: Product, operands: Operands, results: Results) -> _Arguments:
    pre_act = results.pre_act if product.matmul == FORWARD else operands.pre_act
    return _Arguments(
        matmul=product.matmul,
        left=to_kernel(operands.left),
        right=to_kernel(operands.right),
        out=to_kernel(results.out),
        bias=_kernel(operands.bias),
        pre_act=_kernel(pre_act),
        dbias=_kernel(results.dbias),
        activation=product.activation,
        allow_tf32=product.allow_tf32,
    )


def run_fused(product: Product, operands: Operands, algorithm: Algorithm) -> Results:
    """By cuBLASLt; RuntimeError if it refuses."""
    results = _fused_results(product, operands, algorithm.sums)
    _kernels.dense_matmul(
        *_arguments(product, operands, results),
        algorithm[:2],
        _allocator(operands.left),
        launch_context(operands.left),
    )
    if product.dbias and not algorithm.sums:
        summed = operands.left if product.matmul == WEIGHT_GRADIENT else results.out
        return results._replace(dbias=activate_backward_(summed, None, IDENTITY, True))
    return results


def sample(product: Product) -> Operands:
    """Normal values in place of a product's operands; torch's own generators stay untouched."""
    generator = torch.Generator(product.device).manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.empty(shape, dtype=product.dtype, device=product.device)
        return values.normal_(0.0, scale, generator=generator)

    rows, in_features, out_features = product.rows, product.in_features, product.out_features
    if product.matmul == WEIGHT_GRADIENT:
        return Operands(randn(rows, out_features), randn(rows, in_features))
    forward = product.matmul == FORWARD
    left_features = in_features if forward else out_features
    weight = randn(out_features, in_features, scale=left_features**-0.5)
    bias = randn(out_features) if product.bias else None
    has_pre_act = not forward and product.activation != IDENTITY
    pre_act = randn(rows, in_features) if has_pre_act else None
    return Operands(randn(rows, left_features), weight, bias, pre_act)


def algorithms(product: Product, operands: Operands, count: int) -> list[Algorithm]:
    """Up to `count` of each kind, those that the library believes to be the fastest first."""
    found = []
    for sums in (False, True) if product.dbias else (False,):
        if sums and product.matmul == INPUT_GRADIENT and product.activation == IDENTITY:
            continue  # no such epilogue
        arguments = _arguments(product, operands, _fused_results(product, operands, sums))
        with contextlib.suppress(RuntimeError):  # it has none
            offered = _kernels.dense_matmul_algorithms(*arguments, count)
            found += [Algorithm(*algorithm, sums) for algorithm in offered]
    return found


def accepts(product: Product, operands: Operands, algorithm: Algorithm) -> bool:
    """Whether the library takes an algorithm that was stored."""
    results = _fused_results(product, operands, algorithm.sums)
    try:
        _kernels.dense_matmul_check(*_arguments(product, operands, results), algorithm[:2])
    except (RuntimeError, ValueError):
        return False
    return True


def fits_library(product: Product, operands: Operands) -> bool:
    """Whether cuBLASLt could compute the product: sizes, alignment, an epilogue for it.

    The GELU of its epilogues has a fast tanh, wrong by some 1e-5: good enough for float16 and
    bfloat16 alone.
    """
    activations = {FORWARD: (IDENTITY, GELU_APPROX, RELU), INPUT_GRADIENT: (IDENTITY, GELU_APPROX)}
    return (
        product.device.type == "cuda"
        and product.rows > 0
        and product.in_features % 8 == 0
        and product.out_features % 8 == 0
        and product.activation in activations.get(product.matmul, (IDENTITY,))
        and not (product.activation == RELU and product.pre_act)
        and not (product.activation == GELU_APPROX and product.dtype == torch.float32)
        and all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in operands)
    )
