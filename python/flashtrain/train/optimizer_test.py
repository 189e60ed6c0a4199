import pytest
import torch
from torch import nn

from flashtrain.models.gpt import GPT, GPTConfig
from flashtrain.train.config import OptimConfig
from flashtrain.train.optimizer import Optimizer, decayed_names
from flashtrain.train.strategy import Shard

TAKE, SKIP = torch.tensor(False), torch.tensor(True)
ONE = torch.tensor(1.0)


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


def build(model: nn.Module, optim: OptimConfig) -> Optimizer:
    shards = [Shard(name, p, p, p.shape) for name, p in model.named_parameters() if p.requires_grad]
    return Optimizer(shards, decayed_names(model), optim)


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_only_matmul_weights_decay(tie_embeddings: bool) -> None:
    model = gpt(tie_embeddings)
    expected = {
        f"blocks.{i}.{part}.weight"
        for i in range(2)
        for part in ("attention.qkv", "attention.out", "mlp.fc1", "mlp.fc2")
    }
    if not tie_embeddings:
        expected.add("head.weight")
    assert decayed_names(model) == expected
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    build(model, OptimConfig(weight_decay=0.1)).step(0.5, ONE, TAKE)
    for name, parameter in model.named_parameters():
        factor = 0.95 if name in expected else 1.0
        torch.testing.assert_close(parameter.detach(), factor * weights[name], msg=name)


@pytest.mark.parametrize(
    ("fused", "dtype", "tolerance"), [(True, torch.float32, 1e-5), (False, torch.float64, 1e-12)]
)
def test_adamw_follows_the_paper(fused: bool, dtype: torch.dtype, tolerance: float) -> None:
    """Algorithm 2 of Loshchilov & Hutter (2019), in fp64 by hand; gradients come multiplied."""
    model = nn.Linear(3, 2).to(dtype)
    options = OptimConfig(betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3, fused=fused)
    optimizer = build(model, options)
    parameters = {"weight": (model.weight, 0.3), "bias": (model.bias, 0.0)}
    expected = {n: p.detach().double() for n, (p, _) in parameters.items()}
    m = {n: torch.zeros_like(p) for n, p in expected.items()}
    v = {n: torch.zeros_like(p) for n, p in expected.items()}
    generator = torch.Generator().manual_seed(1)
    for t in range(1, 6):
        for name, (parameter, decay) in parameters.items():
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = (4 * gradient).to(dtype)
            m[name] = 0.8 * m[name] + 0.2 * gradient
            v[name] = 0.9 * v[name] + 0.1 * gradient**2
            m_hat, v_hat = m[name] / (1 - 0.8**t), v[name] / (1 - 0.9**t)
            update = m_hat / (v_hat.sqrt() + 1e-6) + decay * expected[name]
            expected[name] = expected[name] - 0.1 * update
        optimizer.step(0.1, torch.tensor(4.0), TAKE)
        for name, (parameter, _) in parameters.items():
            assert parameter.grad is None
            torch.testing.assert_close(
                parameter.detach().double(), expected[name], rtol=tolerance, atol=tolerance
            )


def backward(model: GPT, seed: int) -> None:
    tokens = torch.randint(100, (2, 8), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    model(tokens, tokens).backward()


def states(optimizer: Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    return {
        shard.name: {k: v.clone() for k, v in optimizer.state(shard).items()}
        for shard in optimizer.owned
    }


@pytest.mark.parametrize("fused", [True, False])
def test_gradient_norm(fused: bool) -> None:
    model = gpt()
    optimizer = build(model, OptimConfig(fused=fused))
    backward(model, 0)
    squares = sum(p.grad.double().square().sum() for p in model.parameters())
    assert optimizer.gradient_norm().item() == pytest.approx(squares.sqrt().item(), rel=1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_skipped_step_changes_nothing(fused: bool) -> None:
    model = gpt()
    optimizer = build(model, OptimConfig(fused=fused))
    backward(model, 0)
    optimizer.step(0.1, ONE, TAKE)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = states(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.step(0.1, torch.tensor(torch.nan), SKIP)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
    for name, entries in states(optimizer).items():
        for key, value in entries.items():
            assert torch.equal(value, state[name][key]), (name, key)


@pytest.mark.parametrize("fused", [True, False])
def test_state_continues_exactly(fused: bool) -> None:
    model, other = gpt(), gpt()
    optimizer = build(model, OptimConfig(fused=fused))
    for seed in range(3):
        backward(model, seed)
        optimizer.step(0.1, ONE, TAKE)
    other.load_state_dict(model.state_dict())
    continued, saved = build(other, OptimConfig(fused=fused)), states(optimizer)
    for shard in continued.owned:
        continued.load_state(shard, saved[shard.name])
    for trained, its_optimizer in ((model, optimizer), (other, continued)):
        backward(trained, 3)
        its_optimizer.step(0.1, ONE, TAKE)
    for (name, parameter), same in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, same), name
