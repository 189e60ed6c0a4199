"""Times attention, forward and backward, on every backend that takes the case.

    PYTHONPATH=python:. python experiments/benchmarks/bench_attention.py --out=<folder>

Implementations, each the same function of the same packed q, k and v:
  chosen   flashtrain.ops.attention as it chooses by itself
  sdpa     torch.nn.functional.scaled_dot_product_attention as it chooses by itself
  others   flashtrain.ops.attention made to use one of its backends

TFLOP/s counts the two products of forward, 4 * batch * heads * seqlen_q * seqlen_k * head dim, and
2.5 times as many backward, both halved under a causal mask (flash-attention's convention). With
--out on CUDA also writes attention_times.json, the times that the choice is made by, with these
cases measured anew: copy it to python/flashtrain/ops/attention/times.json.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.benchmarks import harness
from flashtrain.ops.attention import dispatch, flash_attn_func

PEERS = ("sdpa", *dispatch.BACKENDS)
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    seqlen: int
    heads: int
    head_dim: int
    dropout_p: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    window: int = -1  # keys before a query, with the causal mask

    @property
    def name(self) -> str:
        text = f"{self.batch} x {self.seqlen} x {self.heads} x {self.head_dim}"
        text += (
            "" if self.dtype == torch.bfloat16 else f", {str(self.dtype).removeprefix('torch.')}"
        )
        text += f", dropout {self.dropout_p}" if self.dropout_p else ""
        return text + (f", window {self.window}" if self.window >= 0 else "")

    @property
    def flops(self) -> int:
        """Of forward: pairs of query and key times 4 * head dim."""
        pairs = self.seqlen * self.seqlen // 2
        if 0 <= self.window < self.seqlen:
            pairs -= (self.seqlen - self.window) ** 2 // 2
        return 4 * self.batch * self.heads * pairs * self.head_dim


CUDA_CASES = (
    Case(32, 1024, 12, 64),
    Case(8, 2048, 32, 64),
    Case(8, 2048, 16, 128),
    Case(32, 1024, 12, 64, dropout_p=0.1),
)
CPU_CASES = (
    Case(16, 128, 4, 32, dtype=torch.float32),
    Case(2, 1024, 12, 64, dtype=torch.float32),
    Case(1, 2048, 16, 128, dtype=torch.float32),
    Case(2, 1024, 12, 64),
)


def sdpa(case: Case) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=case.dropout_p, is_causal=True)
        return out.transpose(1, 2)

    return attention


def ours(case: Case, backend: str | None) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(
            q, k, v, case.dropout_p, causal=True, window_size=(case.window, 0), backend=backend
        )

    return attention


def implementations(case: Case, peers: tuple[str, ...]) -> dict[str, Attention]:
    found = {"chosen": ours(case, None)}
    if "sdpa" in peers and case.window < 0:
        found["sdpa"] = sdpa(case)
    for name in dispatch.BACKENDS:
        if name in peers and name in dispatch.installed():
            found[name] = ours(case, name)
    return found


def bench_case(case: Case, device: torch.device, peers: tuple[str, ...]) -> list[harness.Row]:
    torch.manual_seed(0)
    shape = (case.batch, case.seqlen, 3, case.heads, case.head_dim)
    qkv = torch.randn(shape, device=device, dtype=case.dtype)
    leaves = [t.requires_grad_() for t in qkv.unbind(2)]
    dout = torch.randn_like(leaves[0])
    expected: list[Tensor] = []
    table = []
    for name, attention in implementations(case, peers).items():
        try:
            out = attention(*leaves)
        except ValueError as error:
            print(f"{case.name}: {error}")
            continue
        results = [out.detach(), *torch.autograd.grad(out, leaves, dout, retain_graph=True)]
        expected = expected or results
        off = 0.0 if case.dropout_p > 0.0 else _relative_error(results, expected)
        if not off < 2e-2:  # bfloat16 rounding is 3e-3; a wrong result is not worth timing
            print(f"{case.name}: {name} is wrong, by {off:.1e} of the norm of the first's")
            continue

        def forward(attention=attention):
            with torch.no_grad():
                attention(*leaves)

        def backward(out=out):
            torch.autograd.grad(out, leaves, dout, retain_graph=True)

        for direction, function, flops in (
            ("forward", forward, case.flops),
            ("backward", backward, case.flops * 5 // 2),
        ):
            row = harness.measure(
                f"{case.name}, {direction}", name, function, 0, device, flops=flops
            )
            table.append(row)
        del out, results
    return table


def _relative_error(results: list[Tensor], expected: list[Tensor]) -> float:
    """The largest over out, dq, dk and dv of |result - expected| / |expected|."""
    return max(
        ((result.float() - reference.float()).norm() / reference.float().norm()).item()
        for result, reference in zip(results, expected)
    )


def times(table: list[harness.Row], device: torch.device) -> dict[str, Any]:
    """attention/times.json with the measured cases in place of older ones."""
    properties = torch.cuda.get_device_properties(device)
    found = json.loads(dispatch.TIMES_FILE.read_text())
    for case in CUDA_CASES:
        milliseconds = {
            direction: {
                row.implementation: (row.device_seconds or 0.0) * 1e3
                for row in table
                if row.case == f"{case.name}, {direction}" and row.implementation in PEERS[1:]
            }
            for direction in ("forward", "backward")
        }
        forward, backward = milliseconds["forward"], milliseconds["backward"]
        key = {
            "capability": 10 * properties.major + properties.minor,
            "head_dim": case.head_dim,
            "seqlen": case.seqlen,
            "dropout": case.dropout_p > 0.0,
        }
        found["rows"] = [row for row in found["rows"] if {k: row[k] for k in key} != key]
        found["rows"].append(
            key
            | {
                "measured": f"{properties.name}, {datetime.date.today()}, "
                f"torch {torch.__version__}",
                "forward": {name: round(ms, 3) for name, ms in forward.items()},
                "forward_backward": {
                    name: round(forward[name] + ms, 3) for name, ms in backward.items()
                },
            }
        )
    return found


def main() -> None:
    arguments = harness.parse_arguments(__doc__.split("\n")[0], PEERS)
    device = arguments.device
    on_cuda = device.type == "cuda"
    if not on_cuda:
        arguments.peers = ("sdpa",)  # there `chosen` is the only backend
    table = [
        row
        for case in (CUDA_CASES if on_cuda else CPU_CASES)
        for row in bench_case(case, device, arguments.peers)
    ]
    harness.report("attention", table, harness.copy_ceiling(device), arguments)
    if on_cuda and arguments.out:
        folder = pathlib.Path(arguments.out)
        folder = folder.parent if folder.suffix == ".md" else folder
        text = json.dumps(times(table, device), indent=1)
        (folder / "attention_times.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
