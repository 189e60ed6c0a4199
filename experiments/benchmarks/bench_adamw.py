"""Times AdamW and gradient clipping against torch.optim.AdamW and clip_grad_norm_.

    PYTHONPATH=python:. python experiments/benchmarks/bench_adamw.py --out=<folder>

On CUDA 1.3e9 parameters in 48 tensors, on the CPU the quickstart's 0.8e6 and 12e6; float32, and
bfloat16 with float32 masters, which torch has not. Peers:
  fused    torch.optim.AdamW(fused=True), clip_grad_norm_(foreach=True)
  foreach  torch.optim.AdamW(foreach=True), clip_grad_norm_(foreach=True)
Bytes, of the least traffic: a step reads gradient, parameter and two moments and writes the latter
three, 28 for each parameter; bfloat16 with masters 30, as it reads both. The norm reads each
gradient once, and a step that is clipped by it moves the sum of both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from experiments.benchmarks import harness
from flashtrain.ops.adamw import FusedAdamW, global_grad_norm

MAX_NORM = 1.0
Functions = dict[str, Callable[[], object]]


def parameters(total: int, tensors: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    params = []
    for _ in range(tensors):
        p = torch.randn(total // tensors, device=device, dtype=dtype).requires_grad_()
        p.grad = torch.randn_like(p)
        params.append(p)
    return params


def ours(params: list[Tensor]) -> Functions:
    optimizer = FusedAdamW(params, lr=1e-4)

    def clipped() -> None:
        norm = global_grad_norm([p.grad for p in params])
        optimizer.step(grad_norm=norm, max_norm=MAX_NORM)

    return {
        "step": optimizer.step,
        "norm": lambda: global_grad_norm([p.grad for p in params]),
        "norm, clipped step": clipped,
    }


def torchs(params: list[Tensor], **options: bool) -> Functions:
    optimizer = torch.optim.AdamW(params, lr=1e-4, **options)

    def clipped() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
        optimizer.step()

    return {
        "step": optimizer.step,
        "norm": lambda: torch.nn.utils.get_total_norm([p.grad for p in params], foreach=True),
        "norm, clipped step": clipped,
    }


def check_same(device: torch.device) -> None:
    """A wrong result is not worth timing."""
    results = []
    for make in (ours, lambda params: torchs(params, fused=True)):
        torch.manual_seed(0)
        params = parameters(10_000, 3, torch.float32, device)
        make(params)["norm, clipped step"]()
        results.append(params)
    torch.testing.assert_close(*results)


def bench_case(
    total: int, tensors: int, dtype: torch.dtype, device: torch.device, peers: tuple[str, ...]
) -> list[harness.Row]:
    torch.manual_seed(0)
    params = parameters(total, tensors, dtype, device)
    count = sum(p.numel() for p in params)
    moved = {"step": (28 if dtype == torch.float32 else 30) * count, "norm": dtype.itemsize * count}
    moved["norm, clipped step"] = moved["step"] + moved["norm"]
    names = {torch.float32: "fp32", torch.bfloat16: "bf16 + masters"}
    label = f"{count / 1e6:,.1f}e6 in {tensors} tensors, {names[dtype]}"
    table = []
    for name in ("ours", "fused", "foreach"):
        if name != "ours" and (name not in peers or dtype != torch.float32):
            continue
        functions = ours(params) if name == "ours" else torchs(params, **{name: True})
        for what, function in functions.items():
            function()
            row = harness.measure(f"{label}, {what}", name, function, moved[what], device)
            table.append(row)
        del functions, function
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return table


def main() -> None:
    arguments = harness.parse_arguments(__doc__.split("\n")[0], ("fused", "foreach"))
    device = arguments.device
    sizes = [(1_300_000_000, 48)] if device.type == "cuda" else [(800_000, 50), (12_000_000, 50)]
    check_same(device)
    ceiling = harness.copy_ceiling(device)
    table = []
    for total, tensors in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            table += bench_case(total, tensors, dtype, device, arguments.peers)
    harness.report("adamw", table, ceiling, arguments)


if __name__ == "__main__":
    main()
