"""Times x = x0 + residual, z = LayerNorm(x), forward and backward, against torch and Liger-Kernel.

    PYTHONPATH=python:. python experiments/benchmarks/bench_layer_norm.py --out=<folder>

On CUDA at 32,768 rows of bfloat16, on the CPU at 2,048. Peers compute the same outputs:
  eager    x0 + residual, then torch.nn.functional.layer_norm
  compile  torch.compile of that expression, compiled anew for each shape (dynamic=False)
  liger    x0 + residual, then liger_layer_norm (it has no fused add for LayerNorm)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.benchmarks import harness
from flashtrain.ops.layer_norm import dropout_add_layer_norm

HIDDEN_SIZES = (768, 1024, 1600, 2048, 4096, 8192)
EPSILON = 1e-5
Norm = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def ours(x0: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return dropout_add_layer_norm(x0, residual, weight, bias, 0.0, EPSILON, prenorm=True)


def eager(x0: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    x = x0 + residual
    z = F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), EPSILON)
    return z.to(x0.dtype), x


def implementations(peers: tuple[str, ...]) -> dict[str, Norm]:
    found: dict[str, Norm] = {"ours": ours}
    if "eager" in peers:
        found["eager"] = eager
    if "compile" in peers:
        torch._dynamo.reset()
        found["compile"] = torch.compile(eager, dynamic=False)
    if "liger" in peers:
        try:
            from liger_kernel.transformers.functional import liger_layer_norm
        except Exception as error:  # whatever the import of a broken package raises
            print(f"liger is left out ({type(error).__name__}: {error})")
            return found

        def liger(x0, residual, weight, bias):
            x = x0 + residual
            z = liger_layer_norm(x, weight.to(x.dtype), bias.to(x.dtype), EPSILON)
            return z.to(x0.dtype), x

        found["liger"] = liger
    return found


def bench_case(
    rows: int, cols: int, dtype: torch.dtype, x_dtype: torch.dtype, device: torch.device, peers
) -> list[harness.Row]:
    torch.manual_seed(0)
    x0, dz = (torch.randn(rows, cols, device=device, dtype=dtype) for _ in range(2))
    residual, dx = (torch.randn(rows, cols, device=device, dtype=x_dtype) for _ in range(2))
    weight, bias = (torch.randn(cols, device=device, dtype=dtype) for _ in range(2))
    leaves = [t.requires_grad_() for t in (x0, residual, weight, bias)]

    size, x_size, parameters = dtype.itemsize, x_dtype.itemsize, 2 * cols * dtype.itemsize
    # Reads x0, residual; writes z, x. Reads dz, dx, x; writes one gradient for both addends, or
    # two where their dtypes differ.
    forward_bytes = rows * cols * (2 * size + 2 * x_size) + parameters
    backward_bytes = rows * cols * (2 * size + 2 * x_size) + 2 * parameters
    if x_dtype != dtype:
        backward_bytes += rows * cols * x_size

    table = []
    expected = eager(*leaves)
    for name, norm in implementations(peers).items():
        outputs = norm(*leaves)
        for output, reference in zip(outputs, expected):
            _check_same(name, output.detach().float(), reference.detach().float())

        def forward(norm=norm):
            with torch.no_grad():
                norm(*leaves)

        def backward(outputs=outputs):
            torch.autograd.grad(outputs, leaves, (dz, dx), retain_graph=True)

        def both(norm=norm):
            torch.autograd.grad(norm(*leaves), leaves, (dz, dx))

        label = f"{rows} x {cols}, {_short(dtype)} + {_short(x_dtype)} residual"
        for direction, function, moved in (
            ("forward", forward, forward_bytes),
            ("backward", backward, backward_bytes),
            ("forward + backward", both, forward_bytes + backward_bytes),
        ):
            case = f"{label}, {direction}"
            table.append(harness.measure(case, name, function, moved, device))
        del outputs
    return table


def _check_same(name: str, output: Tensor, expected: Tensor) -> None:
    """A wrong result is not worth timing; bfloat16 rounding is 2e-3 of the norm."""
    error = ((output - expected).norm() / expected.norm()).item()
    if not error < 1e-2:
        raise AssertionError(f"{name} differs from eager by {error:.1e} of its norm")


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def main() -> None:
    arguments = harness.parse_arguments(__doc__.split("\n")[0], ("eager", "compile", "liger"))
    device = arguments.device
    fp32, bf16 = torch.float32, torch.bfloat16
    rows, dtypes = 32768, [(bf16, bf16), (bf16, fp32)]
    if device.type == "cpu":
        rows, dtypes = 2048, [(fp32, fp32), *dtypes]
    ceiling = harness.copy_ceiling(device)
    table = [
        row
        for dtype, x_dtype in dtypes
        for cols in HIDDEN_SIZES
        for row in bench_case(rows, cols, dtype, x_dtype, device, arguments.peers)
    ]
    harness.report("layer_norm", table, ceiling, arguments)


if __name__ == "__main__":
    main()
