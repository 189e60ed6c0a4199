"""The extension and CPU attention under arguments that overflow, and after calls that failed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from flashtrain import _kernels
from flashtrain.ops.attention import flash_attn_varlen_func

HUGE = 2**63 - 1


def _varlen_gradients(longest: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(8, 2, 8, requires_grad=True) for _ in range(3))
    cu_seqlens = torch.tensor([0, 5, 8], dtype=torch.int32)
    out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest)
    return list(torch.autograd.grad(out.square().sum(), (q, k, v)))


@pytest.mark.parametrize("threads", [1, 2])
def test_longest_sequence_as_an_upper_bound(threads: int) -> None:
    """Dao-AILab/flash-attention#1664: upper bounds for max_seqlen, here 2**31 - 1."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        bounded = _varlen_gradients(2**31 - 1)
        torch.testing.assert_close(bounded, _varlen_gradients(5), rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)


# In a process of its own, whose limit no other test meets.
_FAILED_ALLOCATIONS = """
import torch
from flashtrain import _kernels
from flashtrain.extension_fuzz import limited_memory
from flashtrain.ops.layer_norm import layer_norm
from flashtrain.ops.rotary import apply_rotary_emb

def norm(cols):
    x = torch.ones(2, cols)
    z = torch.zeros(2, cols)
    def call():
        _kernels.layer_norm_forward(x, None, None, None, None, None, None, 0.0, 1.0, True, False, z,
                                    None, None, None, None, 0)
        return z
    return call

narrow, wide = norm(1000), norm(2**22)
for threads in (1, 2):
    torch.set_num_threads(threads)
    _kernels.set_num_threads(threads)
    narrow()
    for spare in range(0, 64, 4):  # MiB; less than the scratch of a thread, of two, or enough
        with limited_memory(spare << 20):
            try:
                wide()
                print("done")
            except MemoryError:
                print("refused")
        torch.testing.assert_close(narrow(), torch.full((2, 1000), 0.5**0.5))
        x = torch.randn(2, 3, 1, 4)
        ones, zeros = torch.ones(3, 2), torch.zeros(3, 2)
        torch.testing.assert_close(apply_rotary_emb(x, ones, zeros), x)
"""


def test_calls_after_a_failed_allocation() -> None:
    """burr-tools/burr-tools#79: std::bad_alloc in a worker thread ends the process."""
    process = subprocess.run(
        [sys.executable, "-c", _FAILED_ALLOCATIONS], capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert "refused" in process.stdout


def _rotary(**changes: object) -> None:
    x, table = torch.randn(1, 3, 2, 8), torch.randn(9, 4)
    arguments: dict[str, Any] = dict.fromkeys(
        ("out", "cos_k", "sin_k", "seqlen_offsets", "cu_seqlens", "position_ids")
    )
    arguments |= {"x": x, "cos": table, "sin": table, "num_heads_q": 2, "num_heads_k": 0}
    arguments |= {"seqlen_offset": 0, "interleaved": False, "conjugate": False, "stream": 0}
    _kernels.rotary(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads_q": HUGE, "num_heads_k": HUGE}, "num_heads_q, num_heads_k: got"),
        ({"num_heads_q": 1, "num_heads_k": HUGE}, "num_heads_q, num_heads_k: got"),
        ({"seqlen_offset": HUGE}, f"seqlen_offset is {HUGE}"),
        ({"seqlen_offsets": torch.tensor([HUGE])}, "seqlen_offsets: token"),
        ({"cos": np.zeros((9, 0), np.float32)}, "cos: got no columns"),
        ({"x": torch.randn(1, 3, 1, 8).expand(1, 3, 2, 8)}, "out: got .*share no memory"),
    ],
)
def test_numbers_that_overflow(changes: dict[str, object], message: str) -> None:
    """pytorch/pytorch#169741: a segfault where a number near the largest overflows."""
    with pytest.raises(ValueError, match=message):
        _rotary(**changes)
