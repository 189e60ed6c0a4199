"""torch.func and torch.compile over whole models: what plain calls give.

Public reports of the kind: pytorch/pytorch#133166, huggingface/transformers#36374 (dynamic shapes),
pytorch/pytorch#198333, #190717 (masks of recomputed blocks).
"""

from typing import Any

import pytest
import torch

from flashtrain.models.gpt_reference import random_tokens, tiny

ROTARY: dict[str, Any] = {"learned_positions": False, "rotary_fraction": 0.5}
OPTIONS: dict[str, dict[str, Any]] = {
    "pre_norm": {},
    "rotary": ROTARY,
    "post_norm": {"block": "post_norm", "alibi": True},
    "parallel": {"block": "parallel", **ROTARY},
    "parallel_tied": {"block": "parallel_tied_norm", "norm": "rms_norm", "window": 3},
    "gated": {"activation": "swiglu", "tie_embeddings": False, "num_kv_heads": 1},
}
paths = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])


@paths
@pytest.mark.parametrize("name", OPTIONS)
def test_func_grad_gives_backwards_gradients(name: str, fused: bool) -> None:
    model = tiny(num_layers=1, **OPTIONS[name], fused=fused)
    batch = (random_tokens(seed=1), random_tokens(seed=2))
    parameters = dict(model.named_parameters())

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, values, batch)

    detached = {key: parameter.detach() for key, parameter in parameters.items()}
    gradients = torch.func.grad(loss)(detached)
    model(*batch).backward()
    for key, parameter in parameters.items():
        torch.testing.assert_close(gradients[key], parameter.grad)


@paths
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", ["pre_norm", "rotary"])
def test_compiled_models_take_other_shapes(name: str, dynamic: bool | None, fused: bool) -> None:
    """docs/models.md promises a whole graph; a second shape makes sizes symbols."""
    torch._dynamo.reset()
    model = tiny(num_layers=1, **OPTIONS[name], fused=fused)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, length in ((2, 5), (3, 9), (4, 12)):
        tokens = random_tokens(batch, length, seed=length)
        torch.testing.assert_close(compiled(tokens, tokens), model(tokens, tokens))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("block", ["pre_norm", "parallel"])
def test_checkpointing_with_dropout_has_the_slope_of_its_loss(block: str, backend: str) -> None:
    """The masks of the recomputed blocks are those of the loss."""
    torch._dynamo.reset()
    dropout: Any = dict.fromkeys(("resid_dropout", "embd_dropout", "attn_dropout"), 0.3)
    model = tiny(block=block, activation_checkpointing=True, fused=True, **dropout)
    tokens = random_tokens()
    call = model if backend == "eager" else torch.compile(model, backend=backend)

    def loss() -> torch.Tensor:
        torch.manual_seed(7)
        return call(tokens, tokens)

    loss().backward()
    parameters = list(model.parameters())
    torch.manual_seed(1)
    directions = [torch.randn_like(p) for p in parameters]
    slope = sum((p.grad * d).sum().item() for p, d in zip(parameters, directions, strict=True))
    step, values = 1e-3, []
    with torch.no_grad():
        for sign in (1, -2):
            torch._foreach_add_(parameters, directions, alpha=sign * step)
            values.append(loss().item())
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=0.03, abs=0.03)
