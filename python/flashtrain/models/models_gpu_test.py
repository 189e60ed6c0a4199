"""Whole models on a GPU: as exact as plain torch in bf16, captured in a CUDA graph, compiled."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashtrain.models.gpt import GPT, GPTConfig
from flashtrain.models.vit import ViT, ViTConfig
from flashtrain.testing.devices import DEVICE, cuda_only

pytestmark = cuda_only

GPT_OPTIONS: dict[str, dict[str, Any]] = {
    "gpt": {"scale_attn_by_inverse_layer_idx": True},
    "rotary": {"rotary_fraction": 0.5, "learned_positions": False},
    "parallel": {"block": "parallel", "rotary_fraction": 1.0},
    "alibi_window": {"alibi": True, "window": 100, "num_kv_heads": 2},
    "rms_swiglu": {"norm": "rms_norm", "activation": "swiglu", "tie_embeddings": False},
    "post_norm": {"block": "post_norm"},
    "fp32_residual": {"residual_in_fp32": True},
    "checkpointing": {"activation_checkpointing": True},
}
NAMES = [*GPT_OPTIONS, "documents", "vit"]


def build(name: str, fused: bool = True, num_layers: int = 3) -> nn.Module:
    """A model with random weights, biases and norms."""
    torch.manual_seed(0)
    with DEVICE:
        if name == "vit":
            shape: Any = {"image_size": 64, "patch_size": 8, "num_channels": 3, "num_classes": 10}
            sizes: Any = {"num_layers": num_layers, "d_model": 256, "num_heads": 4}
            sizes["layer_scale"] = 0.5
            model: nn.Module = ViT(ViTConfig(**shape, **sizes, fused=fused))
        else:
            options = GPT_OPTIONS.get(name, GPT_OPTIONS["rotary"])
            sizes = {"num_layers": num_layers, "d_model": 256, "num_heads": 4}
            sizes["max_seq_len"] = 256
            model = GPT(GPTConfig(vocab_size=1000, **sizes, **options, fused=fused))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def batch_of(name: str) -> tuple[Tensor, ...]:
    generator = torch.Generator(DEVICE).manual_seed(1)
    if name == "vit":
        images = torch.randn(16, 3, 64, 64, device=DEVICE, generator=generator)
        return images, torch.arange(16, device=DEVICE) % 10
    tokens = torch.randint(0, 1000, (4, 257), device=DEVICE, generator=generator)
    batch = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    if name != "documents":
        return batch
    starts = [[0, 100, 101, 256], [0, 256, 256, 256], [0, 3, 200, 256], [0, 128, 256, 256]]
    return (*batch, torch.tensor(starts, dtype=torch.int32, device=DEVICE))


def loss_and_gradients(
    model: nn.Module, forward: Callable[..., Tensor], batch: tuple[Tensor, ...], autocast: bool
) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss = forward(*batch)
    loss.backward()
    return loss.detach().double(), [p.grad.double() for p in model.parameters()]


@pytest.mark.parametrize("name", NAMES)
def test_fused_models_are_as_exact_as_plain_ones(name):
    fused, plain, batch = build(name), build(name, fused=False), batch_of(name)
    exact_batch = tuple(t.double() if t.is_floating_point() else t for t in batch)
    exact_loss, exact = loss_and_gradients(plain.double(), plain, exact_batch, autocast=False)
    plain.float()
    plain_loss, theirs = loss_and_gradients(plain, plain, batch, autocast=True)
    loss, ours = loss_and_gradients(fused, fused, batch, autocast=True)
    assert abs(loss - exact_loss) <= 2 * abs(plain_loss - exact_loss) + 2e-3
    for (parameter, _), mine, other, reference in zip(
        fused.named_parameters(), ours, theirs, exact, strict=True
    ):
        assert mine.isfinite().all(), parameter
        bound = 3 * (other - reference).abs().max() + 1e-4
        assert (mine - reference).abs().max() <= bound, parameter


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_are_captured_in_a_graph(name):
    model, batch = build(name), batch_of(name)
    expected_loss, expected = loss_and_gradients(model, model, batch, autocast=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            loss_and_gradients(model, model, batch, autocast=True)
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        loss = model(*batch)
        loss.backward()
    for parameter in model.parameters():
        parameter.grad.fill_(float("nan"))
    graph.replay()
    assert abs(loss.double() - expected_loss) <= 1e-4
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        scale = gradient.abs().max()
        assert (parameter.grad.double() - gradient).abs().max() <= 2e-2 * scale + 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_graph_breaks(name):
    """With as many blocks as show whether the time to compile grows by a factor with each."""
    model, batch = build(name, num_layers=6), batch_of(name)
    expected_loss, expected = loss_and_gradients(model, model, batch, autocast=True)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    loss, gradients = loss_and_gradients(model, compiled, batch, autocast=True)
    assert abs(loss - expected_loss) <= 5e-3
    for gradient, reference in zip(gradients, expected, strict=True):
        # Both are bf16 with sums of their own.
        assert (gradient - reference).abs().max() <= 5e-2 * reference.abs().max() + 1e-5
