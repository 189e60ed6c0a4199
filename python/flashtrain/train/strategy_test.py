"""The reports of a strategy on its model."""

import functools

import pytest
import torch
from torch import Tensor, nn

from flashtrain.distributed import World
from flashtrain.train.config import RunConfig
from flashtrain.train.strategy import Strategy

CPU = torch.device("cpu")
WORLD = World(rank=0, size=1, local_rank=0, local_size=1, device=CPU)


class Traced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).sum()


class Broken(Traced):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y.sum() * (1 + y.storage_offset())  # which torch.compile cannot trace


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("model", [Traced, Broken])
def test_says_what_keeps_a_model_from_being_compiled(
    model: type[nn.Module], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without a backend, which needs a C++ compiler.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = RunConfig.from_mapping(
        "test", {"data": {"batch_size": 1, "seq_len": 4}, "trainer": {"compile": compiled}}
    )
    strategy = Strategy(config, WORLD, model(), accumulates=False)
    assert strategy.compile_trouble() == ""
    strategy.forward(torch.ones(2, 4)).backward()
    trouble = strategy.compile_trouble()
    if compiled and model is Broken:
        assert trouble.startswith("torch.compile leaves parts of the model out")
        assert "storage_offset" in trouble
        assert "\n" not in trouble
    else:
        assert trouble == ""
