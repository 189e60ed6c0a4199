"""What is here alone: packed sequences of varying lengths, padding, a norm with a dense layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashtrain.compat import flash_attn
from flashtrain.compat.flash_attn import bert_padding
from flashtrain.compat.flash_attn.ops import rms_norm
from flashtrain.compat.flash_attn.ops.triton import layer_norm
from flashtrain.ops.reference.attention import attention as reference_attention
from flashtrain.testing import tolerances
from flashtrain.testing.devices import DEVICE

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _randn(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()


def _check(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: list[Tensor],
    weights: tuple[int, ...] = (),
) -> None:
    """Results and gradients by the error rule; `weights` are places among the inputs."""

    def run(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
        out = function(*leaves)
        torch.manual_seed(1)
        dout = torch.randn(out.shape, device=DEVICE).to(BF16).to(out.dtype)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    doubles = [t.detach().double().requires_grad_() for t in inputs]
    runs = run(ours, inputs), run(plain, inputs), run(plain, doubles)
    for i, (value, in_torch, exact) in enumerate(zip(*runs, strict=True)):
        k = tolerances.K_WEIGHT_GRAD if i - 1 in weights else tolerances.K_OUTPUT
        tolerances.assert_as_exact_as_torch(f"result {i}", value, in_torch, exact, k)


# --- Attention ------------------------------------------------------------------------------------

_LENGTHS = (40, 0, 3, 27)
_CU_SEQLENS = torch.tensor([0, 40, 40, 43, 70], dtype=torch.int32, device=DEVICE)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    groups = zip(*(t.split(_LENGTHS) for t in (q, k, v)))
    return torch.cat([reference_attention(*(t[None] for t in g), **options)[0][0] for g in groups])


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (5, 2), "softcap": 4.0}])
def test_packed_attention_of_varying_lengths(dtype: torch.dtype, options: dict) -> None:
    _check(
        lambda qkv: flash_attn.flash_attn_varlen_qkvpacked_func(qkv, _CU_SEQLENS, 40, **options),
        lambda qkv: _plain_attention(*qkv.unbind(1), **options),
        [_randn(70, 3, 4, 16, dtype=dtype)],
    )
    _check(
        lambda q, kv: flash_attn.flash_attn_varlen_kvpacked_func(
            q, kv, _CU_SEQLENS, _CU_SEQLENS, 40, 40, **options
        ),
        lambda q, kv: _plain_attention(q, *kv.unbind(1), **options),
        [_randn(70, 4, 16, dtype=dtype), _randn(70, 2, 2, 16, dtype=dtype)],
    )


def test_packed_attention_passes_every_option_on() -> None:
    qkv = _randn(70, 3, 2, 16)
    options: dict[str, Any] = {
        "dropout_p": 0.3, "softmax_scale": 0.2, "causal": True, "window_size": (9, 0),
        "softcap": 3.0, "alibi_slopes": torch.rand(2, device=DEVICE), "deterministic": True,
        "return_attn_probs": True,
    }  # fmt: skip
    bounds: Any = (_CU_SEQLENS, _CU_SEQLENS, 40, 40)
    q, k, v = qkv.unbind(1)
    runs = []
    for call in (
        lambda: flash_attn.flash_attn_varlen_func(q, k, v, *bounds, **options),
        lambda: flash_attn.flash_attn_varlen_kvpacked_func(
            qkv[:, 0], qkv[:, 1:], *bounds, **options
        ),
        lambda: flash_attn.flash_attn_varlen_qkvpacked_func(qkv, _CU_SEQLENS, 40, **options),
    ):
        torch.manual_seed(2)
        runs.append(call())
    for run in runs[1:]:
        assert all(torch.equal(ours, expected) for ours, expected in zip(run, runs[0], strict=True))


def test_errors_of_packed_attention() -> None:
    x: Any = torch.zeros(70, 2, 2, 16, device=DEVICE)
    with pytest.raises(ValueError, match=r"qkv: got shape \[70, 2, 2, 16\]; supported: \[total, 3"):
        flash_attn.flash_attn_varlen_qkvpacked_func(x, _CU_SEQLENS, 40)
    with pytest.raises(ValueError, match=r"kv: got shape \[70, 2, 16\]; supported: \[total_k, 2"):
        flash_attn.flash_attn_varlen_kvpacked_func(
            x[:, 0], x[:, 0], _CU_SEQLENS, _CU_SEQLENS, 40, 40
        )
    with pytest.raises(TypeError, match="qkv: got list; supported: Tensor"):
        flash_attn.flash_attn_varlen_qkvpacked_func(x.tolist(), _CU_SEQLENS, 40)


def test_a_cache_is_for_inference() -> None:
    x = torch.zeros(1, 4, 2, 8)
    with pytest.raises(NotImplementedError, match=r"with_kvcache: .* for training only"):
        flash_attn.flash_attn_with_kvcache(x, x, x, cache_seqlens=3, causal=True)
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"block_table: got a tensor; .* for training only"):
        flash_attn.flash_attn_varlen_func(
            x[0], x[0], x[0], cu_seqlens, cu_seqlens, 4, 4, block_table=cu_seqlens
        )


# --- Padding --------------------------------------------------------------------------------------

_MASK = torch.tensor(
    [[1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1]], device=DEVICE, dtype=torch.bool
)


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(), (6,), (2, 3)], ids=str)
def test_padding_away_and_back(shape: tuple[int, ...], kind: torch.dtype) -> None:
    x = _randn(4, 4, *shape)
    rows, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, _MASK.to(kind))
    assert torch.equal(rows, x[_MASK])
    assert indices.tolist() == [0, 1, 2, 9, 11, 12, 13, 14, 15]
    assert cu_seqlens.tolist() == [0, 3, 3, 5, 9]
    assert cu_seqlens.dtype == used.dtype == torch.int32
    assert longest == 4
    assert used.tolist() == [3, 0, 2, 4]
    back = bert_padding.pad_input(rows, indices, 4, 4)
    seen = _MASK.view(4, 4, *(1 for _ in shape))
    assert torch.equal(back, x * seen)
    dout = torch.randn_like(back)
    assert torch.equal(torch.autograd.grad(back, x, dout)[0], dout * seen)


def test_unused_tokens_are_kept_and_not_counted() -> None:
    x, unused = _randn(4, 4, 5), torch.zeros_like(_MASK)
    unused[1, 2] = True
    rows, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, _MASK, unused)
    assert torch.equal(rows, x[_MASK | unused])
    assert 6 in indices.tolist()
    assert cu_seqlens.tolist() == [0, 3, 4, 6, 10]
    assert longest == 4
    assert used.tolist() == [3, 0, 2, 4]


def test_several_sequences_in_a_row() -> None:
    lengths = torch.tensor([[2, 1, 0, 0], [0, 0, 0, 0], [1, 0, 3, 0]], device=DEVICE)
    x = _randn(3, 4, 5)
    found = bert_padding.unpad_input_for_concatenated_sequences(x, lengths)
    rows, indices, cu_seqlens, longest = found
    assert indices.tolist() == [0, 1, 2, 8, 9, 10, 11]
    assert torch.equal(rows, x.flatten(0, 1)[indices])
    assert cu_seqlens.tolist() == [0, 2, 3, 4, 7]
    assert longest == 3


def test_an_empty_batch() -> None:
    x, mask = torch.zeros(0, 4, 5, device=DEVICE), torch.zeros(0, 4, device=DEVICE)
    rows, indices, cu_seqlens, longest, _ = bert_padding.unpad_input(x, mask)
    assert (rows.shape, cu_seqlens.tolist(), longest) == ((0, 5), [0], 0)
    assert bert_padding.pad_input(rows, indices, 0, 4).shape == (0, 4, 5)


def test_a_mask_that_does_not_fit() -> None:
    x = torch.zeros(2, 4, 5)
    with pytest.raises(ValueError, match=r"attention_mask: got shape \[4, 4\]; supported: \[2, 4"):
        bert_padding.unpad_input(x, _MASK)


# --- Norms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("prenorm", [False, True])
def test_a_norm_with_a_dense_layer(dtype: torch.dtype, is_rms_norm: bool, prenorm: bool) -> None:
    shapes = ((32, 96), (32, 96), (96,), (96,), (72, 96), (72,))
    inputs = [_randn(*shape, dtype=dtype) for shape in shapes]

    def ours(x, residual, weight, bias, linear_weight, linear_bias) -> Tensor:
        out = layer_norm.layer_norm_linear_fn(
            x, weight, None if is_rms_norm else bias, linear_weight, linear_bias, residual,
            prenorm=prenorm, is_rms_norm=is_rms_norm,
        )  # fmt: skip
        return torch.cat(out, -1) if prenorm else out

    def plain(x, residual, weight, bias, linear_weight, linear_bias) -> Tensor:
        total = x + residual
        if is_rms_norm:
            z = F.rms_norm(total, (96,), weight, 1e-6)
        else:
            z = F.layer_norm(total, (96,), weight, bias, 1e-6)
        out = F.linear(z, linear_weight, linear_bias)
        return torch.cat([out, total], -1) if prenorm else out

    if is_rms_norm:
        bias = inputs.pop(3)
        _check(
            lambda x, r, w, lw, lb: ours(x, r, w, bias, lw, lb),
            lambda x, r, w, lw, lb: plain(x, r, w, bias, lw, lb),
            inputs,
            weights=(2, 3, 4),
        )
    else:
        _check(ours, plain, inputs, weights=(2, 3, 4, 5))


def test_rms_norm_of_four_arguments() -> None:
    norm = rms_norm.RMSNorm(8, 1e-3, DEVICE, BF16)
    assert (norm.weight.dtype, norm.weight.device.type) == (BF16, DEVICE.type)
    x = _randn(3, 8, dtype=BF16)
    assert torch.equal(norm(x), rms_norm.rms_norm(x, norm.weight, 1e-3))
