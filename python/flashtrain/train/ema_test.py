from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from flashtrain.train.ema import Ema
from flashtrain.train.strategy import Shard


def strategy(model: nn.Module) -> Any:
    shards = [Shard(name, p, p, p.shape) for name, p in model.named_parameters()]
    return SimpleNamespace(shards=shards, weights_written=lambda: None)


def test_average_and_swap() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    ema = Ema(strategy(model), decay=0.75)
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    for _ in range(20):
        for name, parameter in model.named_parameters():
            parameter.data += torch.randn_like(parameter)
            expected[name] = 0.75 * expected[name] + 0.25 * parameter.detach().double()
        ema.update()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    with ema.in_place():
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
        torch.testing.assert_close(
            ema.averages[name].double(), expected[name], rtol=1e-5, atol=1e-6
        )
