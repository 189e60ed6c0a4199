"""Times the MLP D -> 4 D -> D with biases and GELU, forward and backward, against torch.

    PYTHONPATH=python:. python experiments/benchmarks/bench_fused_dense.py --out=<folder>

On CUDA in bfloat16 at the widths of GPT-2 124M, GPT-2 1.5B and GPT-3 1.3B, on the CPU in float32.
"forward" keeps what the backward pass needs, "inference" nothing. Peers compute the same results:
  eager    linear, gelu, linear
  compile  torch.compile of that expression, compiled anew for each shape (dynamic=False)
  matmul   the matrix products of the case alone, by torch: no bias, no activation, no sums
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.benchmarks import harness
from flashtrain.ops.fused_dense import fused_mlp_func

SHAPES = ((32768, 768), (16384, 1600), (16384, 2048))  # rows, D
CPU_SHAPES = ((1024, 768), (512, 1600))
Mlp = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def eager(x: Tensor, weight1: Tensor, weight2: Tensor, bias1: Tensor, bias2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, weight1, bias1), approximate="tanh"), weight2, bias2)


def implementations(peers: tuple[str, ...]) -> dict[str, Mlp]:
    found: dict[str, Mlp] = {"ours": fused_mlp_func}
    if "eager" in peers:
        found["eager"] = eager
    if "compile" in peers:
        torch._dynamo.reset()
        found["compile"] = torch.compile(eager, dynamic=False)
    return found


def products(
    x: Tensor, weight1: Tensor, weight2: Tensor, dout: Tensor
) -> dict[str, Callable[[], object]]:
    """The matrix products of each direction."""
    hidden = F.gelu(x @ weight1.t())

    def forward() -> None:
        x @ weight1.t()
        hidden @ weight2.t()

    def backward() -> None:
        dout @ weight2
        dout.t() @ hidden
        hidden @ weight1
        hidden.t() @ x

    return {"inference": forward, "forward": forward, "backward": backward}


def bench_case(
    rows: int, width: int, dtype: torch.dtype, device: torch.device, peers: tuple[str, ...]
) -> list[harness.Row]:
    torch.manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    hidden = 4 * width
    leaves = [
        randn(rows, width),
        randn(hidden, width, scale=width**-0.5),
        randn(width, hidden, scale=hidden**-0.5),
        randn(hidden),
        randn(width),
    ]
    dout = randn(rows, width)
    flops = 4 * rows * width * hidden
    label = f"{rows} x {width}, {str(dtype).removeprefix('torch.')}"
    x, weight1, weight2 = leaves[:3]
    alone = products(x, weight1, weight2, dout)
    for leaf in leaves:
        leaf.requires_grad_()

    table = []
    expected = eager(*leaves)
    expected_grads = torch.autograd.grad(expected, leaves, dout)
    for name, mlp in implementations(peers).items():
        out = mlp(*leaves)
        grads = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        for value, reference in zip((out, *grads), (expected, *expected_grads)):
            _check_same(name, value.detach().float(), reference.detach().float())

        def inference(mlp=mlp):
            with torch.no_grad():
                mlp(*leaves)

        def forward(mlp=mlp):
            mlp(*leaves)

        def backward(out=out):
            torch.autograd.grad(out, leaves, dout, retain_graph=True)

        for direction, function in (
            ("inference", inference),
            ("forward", forward),
            ("backward", backward),
        ):
            if (name, direction) == ("compile", "inference"):
                continue  # another compilation
            work = flops * (2 if direction == "backward" else 1)
            case = f"{label}, {direction}"
            table.append(harness.measure(case, name, function, 0, device, work))
        del out, grads
    with torch.no_grad():
        for direction, multiply in alone.items():
            work = flops * (2 if direction == "backward" else 1)
            case = f"{label}, {direction}"
            table.append(harness.measure(case, harness.MATMUL, multiply, 0, device, work))
    return table


def _check_same(name: str, value: Tensor, expected: Tensor) -> None:
    """A wrong result is not worth timing; bfloat16 rounding is 2e-3 of the norm."""
    error = ((value - expected).norm() / expected.norm()).item()
    if not error < 1e-2:
        raise AssertionError(f"{name} differs from eager by {error:.1e} of its norm")


def main() -> None:
    arguments = harness.parse_arguments(__doc__.split("\n")[0], ("eager", "compile"))
    device = arguments.device
    on_cpu = device.type == "cpu"
    table = [
        row
        for rows, width in (CPU_SHAPES if on_cpu else SHAPES)
        for row in bench_case(
            rows, width, torch.float32 if on_cpu else torch.bfloat16, device, arguments.peers
        )
    ]
    harness.report("fused_dense", table, harness.copy_ceiling(device), arguments)


if __name__ == "__main__":
    main()
