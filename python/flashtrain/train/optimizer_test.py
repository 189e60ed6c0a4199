import copy

import pytest
import torch
from torch import nn

from flashtrain.models.gpt import GPT, GPTConfig
from flashtrain.train.config import OptimConfig
from flashtrain.train.optimizer import (
    build_optimizer,
    load_named_state,
    named_state,
    parameter_groups,
    step_unless,
)


def gpt(tie_embeddings: bool = True) -> GPT:
    torch.manual_seed(0)
    return GPT(
        GPTConfig(
            vocab_size=100,
            num_layers=2,
            d_model=16,
            num_heads=2,
            max_seq_len=8,
            fused=False,
            tie_embeddings=tie_embeddings,
        )
    )


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_only_matmul_weights_decay(tie_embeddings: bool) -> None:
    model = gpt(tie_embeddings)
    decayed, others = parameter_groups(model, weight_decay=0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    expected = {
        f"blocks.{i}.{part}.weight"
        for i in range(2)
        for part in ("attention.qkv", "attention.out", "mlp.fc1", "mlp.fc2")
    }
    if not tie_embeddings:
        expected.add("head.weight")
    assert {names[id(p)] for p in decayed["params"]} == expected
    every = [*decayed["params"], *others["params"]]
    assert len(every) == len({id(p) for p in every}) == len(names)


def test_frozen_parameters_are_left_out() -> None:
    model = gpt()
    model.embedding.tokens.weight.requires_grad_(False)
    groups = parameter_groups(model, 0.1)
    assert not any(p is model.embedding.tokens.weight for g in groups for p in g["params"])


def test_adamw_follows_the_paper() -> None:
    """Algorithm 2 of Loshchilov & Hutter (2019), in fp64 by hand."""
    model = nn.Linear(3, 2).double()
    optim = OptimConfig(lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    optimizer = build_optimizer(model, optim)
    parameters = {"weight": (model.weight, 0.3), "bias": (model.bias, 0.0)}
    expected = {n: p.detach().clone() for n, (p, _) in parameters.items()}
    m = {n: torch.zeros_like(p) for n, p in expected.items()}
    v = {n: torch.zeros_like(p) for n, p in expected.items()}
    generator = torch.Generator().manual_seed(1)
    for t in range(1, 6):
        for name, (parameter, decay) in parameters.items():
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = gradient
            m[name] = 0.8 * m[name] + 0.2 * gradient
            v[name] = 0.9 * v[name] + 0.1 * gradient**2
            m_hat, v_hat = m[name] / (1 - 0.8**t), v[name] / (1 - 0.9**t)
            update = m_hat / (v_hat.sqrt() + 1e-6) + decay * expected[name]
            expected[name] = expected[name] - 0.1 * update
        step_unless(optimizer, torch.tensor(False))
        for name, (parameter, _) in parameters.items():
            torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-12, atol=1e-12)


def backward(model: GPT, seed: int) -> None:
    tokens = torch.randint(100, (2, 8), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    model(tokens, tokens).backward()


def test_skipped_step_changes_nothing() -> None:
    model = gpt()
    optimizer = build_optimizer(model, OptimConfig(lr=0.1))
    backward(model, 0)
    step_unless(optimizer, torch.tensor(False))
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = {
        name: {k: v.clone() for k, v in entries.items()}
        for name, entries in named_state(model, optimizer).items()
    }
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    step_unless(optimizer, torch.tensor(True))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
    for name, entries in named_state(model, optimizer).items():
        for key, value in entries.items():
            assert torch.equal(value, state[name][key]), (name, key)


def test_named_state_continues_exactly() -> None:
    model, other = gpt(), gpt()
    optimizer = build_optimizer(model, OptimConfig(lr=0.1))
    for seed in range(3):
        backward(model, seed)
        step_unless(optimizer, torch.tensor(False))
    other.load_state_dict(model.state_dict())
    continued = build_optimizer(other, OptimConfig(lr=0.1))
    load_named_state(other, continued, copy.deepcopy(named_state(model, optimizer)))
    for trained, its_optimizer in ((model, optimizer), (other, continued)):
        backward(trained, 3)
        step_unless(its_optimizer, torch.tensor(False))
    for (name, parameter), same in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, same), name


def test_another_models_state_is_refused() -> None:
    model = gpt()
    optimizer = build_optimizer(model, OptimConfig())
    with pytest.raises(KeyError, match="unknown parameter 'nonsense'"):
        load_named_state(model, optimizer, {"nonsense": {}})
    with pytest.raises(ValueError, match=r"norm.weight.exp_avg has shape \(3,\)"):
        load_named_state(model, optimizer, {"norm.weight": {"exp_avg": torch.zeros(3)}})
