"""A training step against plain autograd, and in every precision."""

import pytest
import torch

from flashtrain.distributed import World
from flashtrain.models.gpt import GPT, GPTConfig
from flashtrain.train.build import BatchSizes
from flashtrain.train.config import RunConfig
from flashtrain.train.optimizer import build_optimizer
from flashtrain.train.precision import Precision
from flashtrain.train.step import TrainStep

CPU = torch.device("cpu")
WORLD = World(rank=0, size=1, local_rank=0, local_size=1, device=CPU)


def setup(precision: str, micro: int = 4, lr: float = 1e-2) -> tuple[GPT, TrainStep, Precision]:
    torch.manual_seed(0)
    config = RunConfig.from_mapping(
        "test",
        {
            "data": {"batch_size": micro, "seq_len": 16},
            "optim": {"lr": lr, "schedule": "constant", "weight_decay": 0.0},
            "trainer": {"global_batch_size": 8, "precision": precision, "grad_clip": 0.5},
        },
    )
    model = GPT(
        GPTConfig(vocab_size=64, num_layers=2, d_model=32, num_heads=2, max_seq_len=16, fused=False)
    )
    computed = Precision(precision, CPU)
    step = TrainStep(
        config,
        WORLD,
        BatchSizes(micro, 8 // micro),
        model,
        build_optimizer(model, config.optim),
        computed,
    )
    return model, step, computed


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(64, (8, 17), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def test_accumulates_clips_and_updates_as_autograd_does() -> None:
    model, step, _ = setup("fp32", micro=2)
    reference, _, _ = setup("fp32")
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.0)
    for number in range(3):
        loss, grad_norm, skipped, stop = step(
            number, *batch(number), asked_to_stop=number == 2
        ).tolist()
        expected = reference(*batch(number))
        expected.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in reference.parameters()))
        for parameter in reference.parameters():
            parameter.grad *= min(1.0, 0.5 / norm.item())
        optimizer.step()
        optimizer.zero_grad()
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert grad_norm == pytest.approx(norm.item(), rel=1e-4)
        assert (skipped, stop) == (0, number == 2)
    for (name, parameter), other in zip(
        model.named_parameters(), reference.parameters(), strict=True
    ):
        torch.testing.assert_close(parameter, other, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_learns_in_every_precision(precision: str) -> None:
    _, step, computed = setup(precision)
    losses = [step(number, *batch(), asked_to_stop=False) for number in range(30)]
    first, last = losses[0][0].item(), losses[-1][0].item()
    assert first == pytest.approx(4.16, abs=0.1)  # ln 64
    assert last < first - 1.0
    assert computed.scaler.is_enabled() == (precision == "fp16")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_weights_stay_in_fp32(precision: str) -> None:
    model, step, _ = setup(precision)
    step(0, *batch(), asked_to_stop=False)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_non_finite_loss_skips_the_update(precision: str) -> None:
    model, step, _ = setup(precision)
    step(0, *batch(), asked_to_stop=False)
    with torch.no_grad():
        good = model.norm.bias[0].item()
        model.norm.bias[0] = torch.nan
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss, _, skipped, _ = step(1, *batch(), asked_to_stop=False).tolist()
    assert loss != loss
    assert skipped == 1
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.detach(), weights[name], rtol=0, atol=0, equal_nan=True
        )
    with torch.no_grad():
        model.norm.bias[0] = good
    loss, _, skipped, _ = step(2, *batch(), asked_to_stop=False).tolist()
    assert loss == loss
    assert skipped == 0
    assert not torch.equal(model.norm.weight, weights["norm.weight"])
