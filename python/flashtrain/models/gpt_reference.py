"""What the tests of GPT share: small models, and a reference that owes nothing to the modules.

The reference computes one sequence, one head and one query at a time, in fp64, from the models'
parameters by name.
"""

import cmath
import math
from typing import Any

import torch
from torch import Tensor

from flashtrain.models.gpt import GPT, GPTConfig

TINY = {"vocab_size": 37, "num_layers": 2, "d_model": 24, "num_heads": 3, "max_seq_len": 12}

# Every option of the arithmetic, one at a time, and some that meet.
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "scaled_attention": {"scale_attn_by_inverse_layer_idx": True},
    "untied": {"tie_embeddings": False},
    "mlp_ratio": {"mlp_ratio": 2.5, "layer_norm_eps": 1e-2},
    "fp32_residual": {"residual_in_fp32": True},
    "unpadded": {"pad_vocab_size_multiple": 1},
    "post_norm": {"block": "post_norm"},
    "parallel": {"block": "parallel"},
    "parallel_tied": {"block": "parallel_tied_norm", "norm": "rms_norm"},
    "rms_norm": {"norm": "rms_norm"},
    "rotary": {"rotary_fraction": 1.0, "learned_positions": False},
    "half_rotary": {"rotary_fraction": 0.5, "learned_positions": False},
    "gptj_rotary": {"rotary_fraction": 0.5, "rotary_interleaved": True, "rotary_base": 100.0},
    "alibi": {"alibi": True, "learned_positions": False},
    "window": {"window": 3},
    "grouped_queries": {"num_heads": 4, "num_kv_heads": 2, "rotary_fraction": 1.0},
    "multi_query": {"num_kv_heads": 1, "alibi": True, "window": 4},
    **{name: {"activation": name} for name in ("gelu", "relu", "sqrelu", "glu", "geglu", "swiglu")},
    "checkpointing": {"activation_checkpointing": True},
}


def tiny_config(**overrides: Any) -> GPTConfig:
    return GPTConfig(**{**TINY, "fused": False, **overrides})


def tiny(seed: int = 0, **overrides: Any) -> GPT:
    """A small model whose every parameter is random, biases and norms too."""
    torch.manual_seed(seed)
    model = GPT(tiny_config(**overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_tokens(batch: int = 2, seq_len: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, TINY["vocab_size"], (batch, seq_len), generator=generator)


def reference_logits(
    model: GPT,
    tokens: Tensor,
    documents: list[list[int]] | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """fp64 [B, T, vocab_size].

    Args:
        documents: for each sequence where its documents start; None: one document.
        positions: int64 [B, T]; None: 0..T-1.
    """
    parameters = {name: tensor.double() for name, tensor in model.named_parameters()}
    rows = []
    for i, sequence in enumerate(tokens):
        starts = [0] if documents is None else documents[i]
        places = range(len(sequence)) if positions is None else positions[i].tolist()
        reference = _Reference(model.config, parameters, starts, list(places))
        rows.append(reference.logits(sequence))
    return torch.stack(rows)


class _Reference:
    def __init__(
        self, config: GPTConfig, parameters: dict[str, Tensor], starts: list[int], places: list[int]
    ):
        self.config = config
        self.p = parameters
        self.starts = starts
        self.places = places

    def norm(self, x: Tensor, name: str) -> Tensor:
        if f"{name}.bias" in self.p:
            x = x - x.mean(-1, keepdim=True)
        z = x / torch.sqrt((x**2).mean(-1, keepdim=True) + self.config.layer_norm_eps)
        return z * self.p[f"{name}.weight"] + self.p.get(f"{name}.bias", 0.0)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.p[f"{name}.weight"].T + self.p[f"{name}.bias"]

    def mlp(self, x: Tensor, name: str) -> Tensor:
        def erf_gelu(x: Tensor) -> Tensor:
            return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

        def tanh_gelu(x: Tensor) -> Tensor:
            return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

        functions = {
            "gelu": erf_gelu,
            "gelu_approx": tanh_gelu,
            "relu": lambda x: x * (x > 0),
            "sqrelu": lambda x: x**2 * (x > 0),
            "glu": lambda x: 1 / (1 + torch.exp(-x)),
            "geglu": erf_gelu,
            "swiglu": lambda x: x / (1 + torch.exp(-x)),
        }
        function = functions[self.config.activation]
        hidden = self.linear(x, f"{name}.fc1")
        if self.config.activation.endswith("glu"):
            width = hidden.shape[-1] // 2
            hidden = hidden[..., :width] * function(hidden[..., width:])
        else:
            hidden = function(hidden)
        return self.linear(hidden, f"{name}.fc2")

    def rotated(self, head: Tensor) -> Tensor:
        """[T, K], each pair (a, b) times exp(i angle) as a complex number."""
        config = self.config
        size = int(config.rotary_fraction * head.shape[-1]) // 2 * 2
        out = head.clone()
        for i in range(size // 2):
            a, b = (2 * i, 2 * i + 1) if config.rotary_interleaved else (i, i + size // 2)
            for t, place in enumerate(self.places):
                angle = place * config.rotary_base ** (-2 * i / size)
                turned = torch.complex(head[t, a], head[t, b]) * cmath.exp(1j * angle)
                out[t, a], out[t, b] = turned.real, turned.imag
        return out

    def attention(self, x: Tensor, name: str, layer: int) -> Tensor:
        config = self.config
        head_dim = config.d_model // config.num_heads
        groups = config.num_kv_heads or config.num_heads
        qkv = self.linear(x, f"{name}.qkv").split(head_dim, dim=-1)
        outputs = []
        for head in range(config.num_heads):
            group = head * groups // config.num_heads
            q = self.rotated(qkv[head])
            k = self.rotated(qkv[config.num_heads + group])
            v = qkv[config.num_heads + groups + group]
            slope = 2.0 ** (-8.0 * (head + 1) / config.num_heads)
            if config.num_heads == 3:  # no power of two: 1/16, 1/256 of two heads, 1/4 of four
                slope = (1 / 16, 1 / 256, 1 / 4)[head]
            rows = []
            for t in range(len(x)):
                first = max(start for start in self.starts if start <= t)
                if config.window:
                    first = max(first, t - config.window + 1)
                scores = k[first : t + 1] @ q[t] / math.sqrt(head_dim)
                if config.scale_attn_by_inverse_layer_idx:
                    scores = scores / (layer + 1)
                if config.alibi:
                    scores = scores - slope * torch.arange(t - first, -1, -1)
                weights = torch.exp(scores - scores.max())
                rows.append(weights / weights.sum() @ v[first : t + 1])
            outputs.append(torch.stack(rows))
        return self.linear(torch.cat(outputs, dim=-1), f"{name}.out")

    def block(self, x: Tensor, layer: int) -> Tensor:
        name, kind = f"blocks.{layer}", self.config.block
        if kind == "post_norm":
            x = self.norm(x + self.attention(x, f"{name}.attention", layer), f"{name}.norm1")
            return self.norm(x + self.mlp(x, f"{name}.mlp"), f"{name}.norm2")
        if kind == "pre_norm":
            z = self.norm(x, f"{name}.norm1")
            x = x + self.attention(z, f"{name}.attention", layer)
            return x + self.mlp(self.norm(x, f"{name}.norm2"), f"{name}.mlp")
        second = f"{name}.norm.norm1" if kind == "parallel" else f"{name}.norm"
        attended = self.attention(self.norm(x, f"{name}.norm"), f"{name}.attention", layer)
        return x + attended + self.mlp(self.norm(x, second), f"{name}.mlp")

    def logits(self, tokens: Tensor) -> Tensor:
        x = self.p["embedding.tokens.weight"][tokens]
        if self.config.learned_positions:
            x = x + self.p["embedding.positions.weight"][self.places]
        for layer in range(self.config.num_layers):
            x = self.block(x, layer)
        if self.config.block != "post_norm":
            x = self.norm(x, "norm")
        head = self.p.get("head.weight", self.p["embedding.tokens.weight"])
        return (x @ head.T)[..., : self.config.vocab_size]
