"""Times rotary embedding of queries and keys, forward and backward, against torch and Liger-Kernel.

    PYTHONPATH=python:. python experiments/benchmarks/bench_rotary.py --out=<folder>

B x S x H x D is batch, sequence, heads of the queries (and as many of the keys) and head dim; in
bfloat16 on CUDA, in float32 and bfloat16 on the CPU. Two ways:
  new       q and k [B, S, 2 H, D] in, new tensors out; backward the same
  in place  q and k within packed qkv [B, S, 3, H, D], which autograd does not see
Peers compute the same:
  eager    chunk, multiply, torch.cat (in place: and a copy back)
  compile  torch.compile of that, compiled anew for each shape (dynamic=False)
  liger    LigerRopeFunction on q and k, which must be tensors of their own; it works in place on
           what it is given, so it is listed with both
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from experiments.benchmarks import harness
from flashtrain.ops.rotary import apply_rotary_emb, apply_rotary_emb_qkv_

SHAPES = ((32, 1024, 12, 64), (8, 2048, 16, 128))
CPU_SHAPES = ((2, 1024, 12, 64), (1, 1024, 16, 128))
Rotary = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def eager_in_place(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    qk = qkv[:, :, :2].flatten(2, 3)
    qk.copy_(eager(qk, cos, sin))
    return qkv


def tables(seqlen: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2, device=device) / head_dim)
    angles = torch.outer(torch.arange(seqlen, device=device).float(), frequencies)
    return angles.cos(), angles.sin()


def implementations(peers: tuple[str, ...], in_place: bool) -> dict[str, Rotary]:
    plain = eager_in_place if in_place else eager
    found: dict[str, Rotary] = {"ours": apply_rotary_emb_qkv_ if in_place else apply_rotary_emb}
    if "eager" in peers:
        found["eager"] = plain
    if "compile" in peers:
        torch._dynamo.reset()
        found["compile"] = torch.compile(plain, dynamic=False)
    return found


def liger_function() -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    try:
        from liger_kernel.ops.rope import LigerRopeFunction
    except Exception as error:  # whatever the import of a broken package raises
        print(f"liger is left out ({type(error).__name__}: {error})")
        return None
    return LigerRopeFunction.apply


def bench_new(shape, dtype: torch.dtype, device: torch.device, peers) -> list[harness.Row]:
    batch, seqlen, heads, head_dim = shape
    torch.manual_seed(0)
    x = torch.randn(batch, seqlen, 2 * heads, head_dim, device=device, dtype=dtype)
    grad = torch.randn_like(x)
    x.requires_grad_()
    cos, sin = tables(seqlen, head_dim, device)
    moved = 2 * x.numel() * x.element_size()
    label = f"{'x'.join(map(str, shape))} {_short(dtype)}, new"
    table = []
    expected = eager(x, cos, sin).detach()
    for name, rotary in implementations(peers, in_place=False).items():
        out = rotary(x, cos, sin)
        if not _is_same(name, out.detach(), expected):
            continue

        def forward(rotary=rotary):
            with torch.no_grad():
                rotary(x, cos, sin)

        def backward(out=out):
            torch.autograd.grad(out, x, grad, retain_graph=True)

        table.append(harness.measure(f"{label}, forward", name, forward, moved, device))
        table.append(harness.measure(f"{label}, backward", name, backward, moved, device))
    return table


def bench_in_place(shape, dtype: torch.dtype, device: torch.device, peers) -> list[harness.Row]:
    batch, seqlen, heads, head_dim = shape
    torch.manual_seed(0)
    qkv = torch.randn(batch, seqlen, 3, heads, head_dim, device=device, dtype=dtype)
    cos, sin = tables(seqlen, head_dim, device)
    moved = 2 * qkv[:, :, :2].numel() * qkv.element_size()
    label = f"{'x'.join(map(str, shape))} {_short(dtype)}, in place"
    table = []
    expected = eager_in_place(qkv.clone(), cos, sin)
    # Compared before they are timed, which turns qkv.
    functions = {
        name: rotary
        for name, rotary in implementations(peers, in_place=True).items()
        if _is_same(name, rotary(qkv.clone(), cos, sin), expected)
    }
    for name, rotary in functions.items():

        def in_place(rotary=rotary):
            with torch.no_grad():
                rotary(qkv, cos, sin)

        table.append(harness.measure(f"{label}, forward", name, in_place, moved, device))
    return table


def bench_liger(shape, dtype: torch.dtype, device: torch.device) -> list[harness.Row]:
    """Forward under both labels, backward under that of new tensors."""
    rope = liger_function()
    if rope is None:
        return []
    batch, seqlen, heads, head_dim = shape
    torch.manual_seed(0)
    q, k = (  # its layout: [B, H, S, D] views of [B, S, H, D]
        torch.randn(batch, seqlen, heads, head_dim, device=device, dtype=dtype).transpose(1, 2)
        for _ in range(2)
    )
    cos, sin = (t.repeat(1, 2)[None].to(dtype) for t in tables(seqlen, head_dim, device))
    expected = eager(q.transpose(1, 2), cos[0, :, : head_dim // 2], sin[0, :, : head_dim // 2])
    if not _is_same("liger", rope(q.clone(), k.clone(), cos, sin)[0].transpose(1, 2), expected):
        return []
    moved = 4 * q.numel() * q.element_size()
    label = f"{'x'.join(map(str, shape))} {_short(dtype)}"

    def forward():
        with torch.no_grad():
            rope(q, k, cos, sin)

    table = [
        harness.measure(f"{label}, {way}, forward", "liger", forward, moved, device)
        for way in ("new", "in place")
    ]
    outputs = rope(q.detach().requires_grad_() * 1, k.detach().requires_grad_() * 1, cos, sin)
    grads = tuple(torch.randn_like(t) for t in outputs)

    def backward():
        outputs[0].grad_fn.apply(*grads)

    return [*table, harness.measure(f"{label}, new, backward", "liger", backward, moved, device)]


def _is_same(name: str, output: Tensor, expected: Tensor) -> bool:
    """A wrong result is not worth timing; bfloat16 rounding is 4e-3 of the norm."""
    error = ((output.float() - expected.float()).norm() / expected.float().norm()).item()
    if error < 1e-2:
        return True
    message = f"{name} differs from eager by {error:.1e} of its norm"
    if name == "ours":
        raise AssertionError(message)
    print(f"{message}: left out")
    return False


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def main() -> None:
    arguments = harness.parse_arguments(__doc__.split("\n")[0], ("eager", "compile", "liger"))
    device = arguments.device
    shapes, dtypes = SHAPES, [torch.bfloat16]
    if device.type == "cpu":
        shapes, dtypes = CPU_SHAPES, [torch.float32, torch.bfloat16]
    ceiling = harness.copy_ceiling(device)
    table = []
    for dtype in dtypes:
        for shape in shapes:
            table += bench_new(shape, dtype, device, arguments.peers)
            table += bench_in_place(shape, dtype, device, arguments.peers)
            if "liger" in arguments.peers:
                table += bench_liger(shape, dtype, device)
    harness.report("rotary", table, ceiling, arguments)


if __name__ == "__main__":
    main()
