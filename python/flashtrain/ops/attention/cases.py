"""What the attention tests share: a case, its inputs, and ours held against torch and fp64."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor

from flashtrain.ops import attention as attn
from flashtrain.ops.reference import attention as reference
from flashtrain.testing import tolerances
from flashtrain.testing.devices import DEVICE

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
NATIVE = "triton" if DEVICE.type == "cuda" else "cpu"


@dataclasses.dataclass(frozen=True)
class Case:
    """With `lengths`, (Sq, Sk) of each sequence, a varlen call that reads no batch and seqlens."""

    batch: int = 2
    seqlen_q: int = 100
    seqlen_k: int = 100
    heads: int = 2
    heads_k: int = 2
    head_dim: int = 64
    lengths: tuple[tuple[int, int], ...] = ()
    dtype: torch.dtype = BF16
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    scale: float | None = None
    softcap: float = 0.0
    alibi: bool = False
    dropout_p: float = 0.0
    backend: str | None = NATIVE

    @property
    def sequences(self) -> tuple[tuple[int, int], ...]:
        return self.lengths or ((self.seqlen_q, self.seqlen_k),) * self.batch

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        """Leaves q, k, v that require grad, in one row of all sequences: [total, heads, D]."""
        torch.manual_seed(seed)
        total_q, total_k = (sum(s[i] for s in self.sequences) for i in (0, 1))

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, device=DEVICE).to(self.dtype).requires_grad_()

        return {
            "q": randn(total_q, self.heads, self.head_dim),
            "k": randn(total_k, self.heads_k, self.head_dim),
            "v": randn(total_k, self.heads_k, self.head_dim),
        }

    def slopes(self) -> Tensor | None:
        if not self.alibi:
            return None
        shape = (len(self.sequences), self.heads)
        return torch.linspace(0.5, 0.01, shape[0] * shape[1], device=DEVICE).view(shape)

    def cu_seqlens(self) -> tuple[Tensor, Tensor]:
        bounds = (itertools.accumulate((s[i] for s in self.sequences), initial=0) for i in (0, 1))
        q, k = (torch.tensor(list(b), dtype=torch.int32, device=DEVICE) for b in bounds)
        return q, k

    def options(self) -> dict:
        return {
            "dropout_p": self.dropout_p,
            "softmax_scale": self.scale,
            "causal": self.causal,
            "window_size": self.window,
            "softcap": self.softcap,
            "alibi_slopes": self.slopes(),
            "backend": self.backend,
        }

    def ours(self, inputs: dict[str, Tensor], **changes):
        """out [total, heads, D], or what return_attn_probs gives."""
        q, k, v = inputs["q"], inputs["k"], inputs["v"]
        options = self.options() | changes
        if self.lengths:
            cu_q, cu_k = self.cu_seqlens()
            max_q, max_k = (max(s[i] for s in self.sequences) for i in (0, 1))
            return attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, **options)
        q = q.view(self.batch, self.seqlen_q, self.heads, self.head_dim)
        k, v = (t.view(self.batch, self.seqlen_k, self.heads_k, self.head_dim) for t in (k, v))
        result = attn.flash_attn_func(q, k, v, **options)
        return result.flatten(0, 1) if isinstance(result, Tensor) else result

    def reference(
        self,
        inputs: dict[str, Tensor],
        compute_dtype: torch.dtype | None,
        rng_state: Tensor | None = None,
    ) -> Tensor:
        """out [total, heads, D], sequence by sequence."""
        outs, row_q, row_k = [], 0, 0
        for b, (seqlen_q, seqlen_k) in enumerate(self.sequences):
            q = inputs["q"][None, row_q : row_q + seqlen_q]
            k, v = (inputs[name][None, row_k : row_k + seqlen_k] for name in "kv")
            keep = None
            if rng_state is not None:
                keep = reference.attention_keep_mask(
                    rng_state, 1, self.heads, seqlen_q, seqlen_k, self.dropout_p, row_q
                )
            slopes = self.slopes()
            out, _ = reference.attention(
                q, k, v,
                softmax_scale=self.scale, causal=self.causal, window_size=self.window,
                softcap=self.softcap, alibi_slopes=None if slopes is None else slopes[b : b + 1],
                dropout_p=self.dropout_p, keep_mask=keep, compute_dtype=compute_dtype,
            )  # fmt: skip
            outs.append(out[0])
            row_q, row_k = row_q + seqlen_q, row_k + seqlen_k
        return torch.cat(outs)


def attend(qkv: Any, **options: Any) -> Any:
    """flash_attn_func of the three tensors of `qkv`."""
    q, k, v = qkv
    return attn.flash_attn_func(q, k, v, **options)


def results_and_gradients(inputs: dict[str, Tensor], out: Tensor) -> dict[str, Tensor]:
    """out, dq, dk, dv for an output gradient that depends on the shape alone."""
    torch.manual_seed(1)
    dout = torch.randn(out.shape, device=DEVICE).to(BF16).to(out.dtype)
    names = [name for name, t in inputs.items() if t.requires_grad]
    grads = torch.autograd.grad(out, [inputs[name] for name in names], dout)
    return {"out": out.detach()} | {f"d{name}": grad for name, grad in zip(names, grads)}


def next_rng_state() -> Tensor:
    """The {seed, offset} that the next call draws, without drawing it."""
    generator = torch.cuda if DEVICE.type == "cuda" else torch
    state = generator.get_rng_state()
    drawn = torch.randint(0, 2**62, (2,), dtype=torch.int64, device=DEVICE)
    generator.set_rng_state(state)
    return drawn


def check(case: Case) -> None:
    """Forward and backward of `case` against torch and the exact result."""
    inputs = case.inputs()
    rng_state = next_rng_state() if case.dropout_p > 0.0 else None
    ours = results_and_gradients(inputs, case.ours(inputs))
    in_torch = results_and_gradients(inputs, case.reference(inputs, None, rng_state))
    doubles = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    exact = results_and_gradients(doubles, case.reference(doubles, torch.float64, rng_state))
    k = tolerances.K_DROPOUT if case.dropout_p > 0.0 else tolerances.K_OUTPUT
    for name, value in ours.items():
        tolerances.assert_as_exact_as_torch(name, value, in_torch[name], exact[name], k)
