"""Times the mean cross entropy of logits, forward and in-place backward, against torch and Liger.

    PYTHONPATH=python:. python experiments/benchmarks/bench_cross_entropy.py --out=<folder>

On CUDA at 16,384 rows of bfloat16, on the CPU at 256 rows. Peers compute the same loss and the same
gradient:
  eager    torch.nn.functional.cross_entropy of logits.float()
  compile  torch.compile of that expression, compiled anew for each shape (dynamic=False)
  liger    liger_cross_entropy, whose forward leaves the gradient in the logits

Bytes: forward reads the logits; backward reads them and writes the gradient. Liger's forward does
both where a gradient is required, so its forward alone is timed without.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.benchmarks import harness
from flashtrain.ops.cross_entropy import CrossEntropyLoss

VOCABULARIES = (50304, 50257)  # GPT-2's, padded and not
Loss = Callable[[Tensor, Tensor], Tensor]


def eager(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels)


def implementations(peers: tuple[str, ...]) -> dict[str, Loss]:
    found: dict[str, Loss] = {"ours": CrossEntropyLoss(inplace_backward=True)}
    if "eager" in peers:
        found["eager"] = eager
    if "compile" in peers:
        torch._dynamo.reset()
        found["compile"] = torch.compile(eager, dynamic=False)
    if "liger" in peers:
        try:
            from liger_kernel.transformers.functional import liger_cross_entropy
        except Exception as error:  # whatever the import of a broken package raises
            print(f"liger is left out ({type(error).__name__}: {error})")
            return found
        found["liger"] = liger_cross_entropy
    return found


def check_same(name: str, loss: Loss, logits: Tensor, labels: Tensor) -> None:
    """A wrong result is not worth timing; on few rows, since fp32 copies of all may not fit."""
    few, few_labels = logits.detach()[:64].clone(), labels[:64]
    results = []
    for function in (loss, eager):
        leaf = few.clone().requires_grad_()
        value = function(leaf * 1.0, few_labels)  # not the leaf itself: Liger overwrites it
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    for ours, expected in zip(*results):
        error = ((ours.float() - expected.float()).norm() / expected.float().norm()).item()
        if not error < 1e-2:
            raise AssertionError(f"{name} differs from eager by {error:.1e} of its norm")


def bench_case(
    rows: int, cols: int, dtype: torch.dtype, device: torch.device, peers: tuple[str, ...]
) -> list[harness.Row]:
    torch.manual_seed(0)
    logits = torch.randn(rows, cols, device=device, dtype=dtype)
    labels = torch.randint(0, cols, (rows,), device=device)
    moved = logits.numel() * dtype.itemsize
    label = f"{rows} x {cols}, {str(dtype).split('.')[1]}"
    table = []
    for name, loss in implementations(peers).items():
        if name != "compile":  # it is eager's own expression, and would be compiled once more
            check_same(name, loss, logits, labels)

        def forward(loss=loss):
            with torch.no_grad():
                loss(logits, labels)

        def both(loss=loss):
            leaf = logits.detach().requires_grad_()
            torch.autograd.grad(loss(leaf, labels), leaf)

        table.append(harness.measure(f"{label}, forward", name, forward, moved, device))
        table.append(harness.measure(f"{label}, forward + backward", name, both, 3 * moved, device))
        # What ours and Liger's have overwritten.
        logits.normal_()
    return table


def main() -> None:
    arguments = harness.parse_arguments(__doc__.split("\n")[0], ("eager", "compile", "liger"))
    device = arguments.device
    rows, dtypes = 16384, [torch.bfloat16]
    if device.type == "cpu":
        rows, dtypes = 256, [torch.float32, torch.bfloat16]
    ceiling = harness.copy_ceiling(device)
    table = [
        row
        for dtype in dtypes
        for cols in VOCABULARIES
        for row in bench_case(rows, cols, dtype, device, arguments.peers)
    ]
    harness.report("cross_entropy", table, ceiling, arguments)


if __name__ == "__main__":
    main()
