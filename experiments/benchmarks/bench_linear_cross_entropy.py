"""Times the loss of a language model's head, forward + backward, against torch and Liger-Kernel.

    PYTHONPATH=python:. python experiments/benchmarks/bench_linear_cross_entropy.py --out=<folder>

On CUDA at 16,384 rows of bfloat16, on the CPU at 256 rows of float32. Peers compute the same loss
and the same gradients of hidden and weight:
  eager    torch.nn.functional.cross_entropy of linear(hidden, weight).float()
  compile  torch.compile of that expression, compiled anew for each shape (dynamic=False)
  liger    liger_fused_linear_cross_entropy; it sums the weight's gradient in bfloat16
  liger32  the same with accum_dtype=float32, as ours does
  matmul   the three matrix products alone, on logits of all rows: the ceiling

FLOPs: three products of 2 * rows * D * V. The table of memory says what a call allocates at its
peak, gradients included.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.benchmarks import harness
from flashtrain.ops.linear_cross_entropy import linear_cross_entropy

SIZES = ((2048, 50304), (768, 50304))  # D, V: of GPT-3 1.3B and GPT-2 124M
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def implementations(peers: tuple[str, ...]) -> dict[str, Loss]:
    found: dict[str, Loss] = {"ours": linear_cross_entropy}
    if "eager" in peers:
        found["eager"] = eager
    if "compile" in peers:
        torch._dynamo.reset()
        found["compile"] = torch.compile(eager, dynamic=False)
    if "liger" in peers:
        try:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
        except Exception as error:  # whatever the import of a broken package raises
            print(f"liger is left out ({type(error).__name__}: {error})")
            return found
        found["liger"] = liger_fused_linear_cross_entropy

        def liger32(hidden, weight, labels):
            return liger_fused_linear_cross_entropy(
                hidden, weight, labels, accum_dtype=torch.float32
            )

        found["liger32"] = liger32
    return found


def gradients(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    value = loss(hidden, weight, labels)
    return value.detach(), *torch.autograd.grad(value, (hidden, weight))


def check_same(name: str, results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """A wrong result is not worth timing."""
    for result, reference in zip(results, expected):
        error = ((result.float() - reference.float()).norm() / reference.float().norm()).item()
        if not error < 2e-2:
            raise AssertionError(f"{name} differs from eager by {error:.1e} of its norm")


def peak_gibibytes(function: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def matmuls(hidden: Tensor, weight: Tensor) -> Callable[[], None]:
    def products() -> None:
        with torch.no_grad():
            logits = hidden @ weight.t()
            logits @ weight
            logits.t() @ hidden

    return products


def bench_case(
    rows: int, depth: int, classes: int, dtype: torch.dtype, device: torch.device, peers
) -> tuple[list[harness.Row], dict[str, float]]:
    torch.manual_seed(0)
    hidden = torch.randn(rows, depth, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(classes, depth, device=device) * 0.02).to(dtype).requires_grad_()
    labels = torch.randint(0, classes, (rows,), device=device)
    flops = 3 * 2 * rows * depth * classes
    moved = 2 * (hidden.nbytes + weight.nbytes)
    label = f"{rows} x {depth} x {classes}, {str(dtype).split('.')[1]}"
    table, memory = [], {}
    few = hidden.detach()[:128].requires_grad_()
    expected = gradients(eager, few, weight, labels[:128])
    for name, loss in implementations(peers).items():
        if name != "compile":  # it is eager's own expression, and would be compiled once more
            check_same(name, gradients(loss, few, weight, labels[:128]), expected)

        def both(loss=loss):
            gradients(loss, hidden, weight, labels)

        table.append(harness.measure(label, name, both, moved, device, flops))
        if device.type == "cuda":
            memory[name] = peak_gibibytes(both)
    products = matmuls(hidden, weight)
    table.append(harness.measure(label, harness.MATMUL, products, moved, device, flops))
    return table, memory


def memory_table(memory: dict[str, dict[str, float]]) -> list[str]:
    if not any(memory.values()):
        return []
    names = list(dict.fromkeys(name for row in memory.values() for name in row))
    lines = [["case", *(f"{name}, GiB" for name in names)], ["---"] + ["---:"] * len(names)]
    for case, row in memory.items():
        lines.append([case, *(f"{row[name]:.2f}" if name in row else "-" for name in names)])
    return ["## Peak memory", "", *(f"| {' | '.join(line)} |" for line in lines), ""]


def main() -> None:
    arguments = harness.parse_arguments(__doc__.split("\n")[0], ("eager", "compile", "liger"))
    device = arguments.device
    rows, dtype, sizes = 16384, torch.bfloat16, list(SIZES)
    if device.type == "cpu":
        rows, dtype, sizes = 256, torch.float32, list(SIZES[1:])
    ceiling = harness.copy_ceiling(device)
    table, memory = [], {}
    for depth, classes in sizes:
        rows_of_case, peaks = bench_case(rows, depth, classes, dtype, device, arguments.peers)
        table += rows_of_case
        memory[rows_of_case[0].case] = peaks
    harness.report("linear_cross_entropy", table, ceiling, arguments, memory_table(memory))


if __name__ == "__main__":
    main()
