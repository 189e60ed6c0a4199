"""Launches of the Triton kernels of attention. Imported where CUDA tensors come, as triton is."""

from __future__ import annotations

import dataclasses
import struct

import torch
import triton
from torch import Tensor

from flashtrain.ops.attention.triton.backward import (
    attention_backward_dkv_kernel,
    attention_backward_dq_kernel,
)
from flashtrain.ops.attention.triton.forward import attention_forward_kernel


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """The options of a call, without its tensors; see native.py."""

    varlen: bool
    batch: int
    max_seqlen_q: int
    max_seqlen_k: int
    softmax_scale: float
    softcap: float
    window_left: int
    window_right: int
    dropout_p: float

    @property
    def dropout_threshold(self) -> int:
        """DropoutThreshold of cc/common/philox.h."""
        (p,) = struct.unpack("f", struct.pack("f", self.dropout_p))
        return min(int(p * 2**32), 2**32 - 1)


@dataclasses.dataclass(frozen=True)
class Tile:
    """Launch geometry of a kernel: BLOCK_M queries by BLOCK_N keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (kernel, BLOCK_D up to, dropout) -> the fastest of 4 to 10 geometries on an H100 (80GB HBM3,
# 2026-11-24), bfloat16, causal, at batch x seqlen x heads x head dim 32x1024x24x32, 32x1024x12x64,
# 8x2048x32x64, 8x2048x16x128 and 8x2048x8x256. With dropout 64 and 128 were tried.
_TILES = {
    ("forward", 32, False): Tile(64, 64, 4, 4),
    ("forward", 64, False): Tile(128, 64, 8, 3),
    ("forward", 128, False): Tile(64, 64, 4, 3),
    ("forward", 256, False): Tile(128, 64, 8, 2),
    ("forward", 32, True): Tile(64, 64, 4, 3),
    ("forward", 64, True): Tile(64, 64, 4, 3),
    ("forward", 128, True): Tile(64, 64, 4, 2),
    ("forward", 256, True): Tile(64, 32, 4, 2),
    ("dq", 32, False): Tile(64, 64, 4, 3),
    ("dq", 64, False): Tile(64, 64, 4, 2),
    ("dq", 128, False): Tile(64, 64, 4, 2),
    ("dq", 256, False): Tile(32, 32, 4, 2),
    ("dq", 32, True): Tile(64, 64, 4, 2),
    ("dq", 64, True): Tile(64, 64, 4, 2),
    ("dq", 128, True): Tile(64, 64, 4, 2),
    ("dq", 256, True): Tile(32, 32, 4, 2),
    ("dkv", 32, False): Tile(64, 128, 4, 2),
    ("dkv", 64, False): Tile(32, 128, 4, 2),
    ("dkv", 128, False): Tile(32, 64, 4, 2),
    ("dkv", 256, False): Tile(32, 32, 4, 2),
    ("dkv", 32, True): Tile(64, 64, 4, 2),
    ("dkv", 64, True): Tile(64, 64, 4, 2),
    ("dkv", 128, True): Tile(32, 64, 4, 2),
    ("dkv", 256, True): Tile(32, 32, 4, 2),
}

# Products in three parts want so many registers that larger tiles spill by the kilobyte.
_FLOAT32_TILES = {
    ("forward", 64): Tile(64, 32, 4, 2),
    ("forward", 128): Tile(32, 32, 4, 2),
    ("forward", 256): Tile(32, 16, 8, 1),
    ("dq", 64): Tile(64, 32, 4, 2),
    ("dq", 128): Tile(32, 32, 4, 2),
    ("dq", 256): Tile(16, 16, 4, 1),
    ("dkv", 64): Tile(32, 64, 4, 2),
    ("dkv", 128): Tile(32, 32, 4, 2),
    ("dkv", 256): Tile(16, 16, 4, 1),
}


def _tile(
    kernel: str, dtype: torch.dtype, block_d: int, dropout: bool, device: torch.device
) -> Tile:
    """The geometry for a kernel on a device, which must have the shared memory for it."""
    if dtype == torch.float32:
        return _FLOAT32_TILES[kernel, max(64, block_d)]  # 99 KB at most
    shared_memory = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    if block_d == 256 and shared_memory < 200_000:  # Hopper's tile of forward takes 192 KB
        return Tile(32, 32, 4, 1)
    tile = _TILES[kernel, max(32, block_d), dropout]
    if block_d == 128 and shared_memory < 120_000:  # GeForce: 99 KB
        return dataclasses.replace(tile, num_stages=1)
    return tile


def _strides(*tensors: Tensor) -> list[int]:
    """Row, head and batch stride of each [batch, row, head, D] or [row, head, D]."""
    return [
        stride
        for tensor in tensors
        for stride in (tensor.stride(-3), tensor.stride(-2), tensor.stride(0))
    ]


def _shared(q: Tensor, k: Tensor, lse: Tensor, alibi: Tensor | None, options: AttentionOptions):
    """Arguments that all kernels take, positional and by name."""
    varlen = options.varlen
    num_heads, head_dim = q.shape[-2:]
    positional = (
        lse.stride(-2),
        0 if varlen else lse.stride(0),
        alibi.stride(0) if alibi is not None and alibi.dim() == 2 else 0,
        num_heads,
        num_heads // k.shape[-2],
        options.max_seqlen_q,
        options.max_seqlen_k,
        q.shape[-3],
        k.shape[-3],
        options.softmax_scale,
        options.softcap,
        options.window_left,
        options.window_right,
        options.dropout_threshold,
        1.0 / (1.0 - options.dropout_p),
    )
    named = {
        "VARLEN": varlen,
        "HAS_LEFT": options.window_left >= 0,
        "HAS_RIGHT": options.window_right >= 0,
        "HAS_SOFTCAP": options.softcap > 0.0,
        "HAS_ALIBI": alibi is not None,
        "HAS_DROPOUT": options.dropout_p > 0.0,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        # float32 inputs are split into three tf32 products, as exact as float32's own; made of
        # fused multiply-adds ("ieee") they spill tens of kilobytes and compile for half a minute.
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
    }
    return positional, named


def _geometry(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _grid(side: str, max_seqlen: int, block: int, heads: int, batch: int) -> tuple[int]:
    programs = triton.cdiv(max_seqlen, block) * heads * batch
    if programs >= 2**31:
        raise ValueError(
            f"max_seqlen_{side}: got {max_seqlen} for {batch} sequences of {heads} heads, "
            f"{programs} blocks; supported: fewer than 2**31 (the length of the longest sequence)"
        )
    return (programs,)


def forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, alibi: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, rng_state: Tensor | None,
    options: AttentionOptions,
) -> None:  # fmt: skip
    """Fills out and lse."""
    positional, named = _shared(q, k, lse, alibi, options)
    tile = _tile("forward", q.dtype, named["BLOCK_D"], named["HAS_DROPOUT"], q.device)
    grid = _grid("q", options.max_seqlen_q, tile.block_m, q.shape[-2], options.batch)
    if grid[0] == 0:
        return
    with torch.cuda.device(q.device):
        attention_forward_kernel[grid](
            q, k, v, out, lse, alibi, cu_seqlens_q, cu_seqlens_k, rng_state,
            *_strides(q, k, v, out), *positional, **named, **_geometry(tile),
        )  # fmt: skip


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, alibi: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, rng_state: Tensor | None,
    dq: Tensor, dk: Tensor, dv: Tensor, options: AttentionOptions,
) -> None:  # fmt: skip
    """Fills dq, dk and dv."""
    positional, named = _shared(q, k, lse, alibi, options)
    delta = torch.empty_like(lse)
    shape = (q.dtype, named["BLOCK_D"], named["HAS_DROPOUT"], q.device)
    dq_tile, dkv_tile = _tile("dq", *shape), _tile("dkv", *shape)
    batch = options.batch
    dq_grid = _grid("q", options.max_seqlen_q, dq_tile.block_m, q.shape[-2], batch)
    dkv_grid = _grid("k", options.max_seqlen_k, dkv_tile.block_n, k.shape[-2], batch)
    with torch.cuda.device(q.device):
        if dq_grid[0] > 0:
            attention_backward_dq_kernel[dq_grid](
                q, k, v, out, dout, lse, delta, dq, alibi, cu_seqlens_q, cu_seqlens_k, rng_state,
                *_strides(q, k, v, out, dout, dq), *positional, **named, **_geometry(dq_tile),
            )  # fmt: skip
        if dkv_grid[0] > 0:
            attention_backward_dkv_kernel[dkv_grid](
                q, k, v, dout, lse, delta, dk, dv, alibi, cu_seqlens_q, cu_seqlens_k, rng_state,
                *_strides(q, k, v, dout, dk, dv), *positional,
                EVEN_M=not options.varlen and options.max_seqlen_q % dkv_tile.block_m == 0,
                ONE_HEAD=q.shape[-2] == k.shape[-2],
                **named, **_geometry(dkv_tile),
            )  # fmt: skip
