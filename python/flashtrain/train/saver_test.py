"""The saver's copies of a device's tensors, from one save to the next."""

from pathlib import Path

import pytest
import torch

from flashtrain.distributed import World
from flashtrain.testing.devices import DEVICE
from flashtrain.train import checkpoint
from flashtrain.train.checkpoint import Reader
from flashtrain.train.config import TrainerConfig
from flashtrain.train.saver import Held, Saver
from flashtrain.train.state import all_finite


def test_each_save_has_the_shape_dtype_and_values_of_its_tensor(tmp_path: Path) -> None:
    """A host buffer kept from the save before may fit in its shape and not in its dtype."""
    writer = Saver(tmp_path, World(0, 1, 0, 1, DEVICE), TrainerConfig(keep_checkpoints=9))
    tensors = [
        torch.tensor([1 + 2.0**-20] * 3, dtype=torch.float32),
        torch.tensor([1 + 2.0**-40] * 3, dtype=torch.float64),
        torch.tensor([1.5] * 3, dtype=torch.bfloat16),
        torch.tensor([2.5] * 4, dtype=torch.bfloat16),
    ]
    for step, tensor in enumerate(tensors):
        writer.save(step, {"x": Held(tensor.to(DEVICE)), "y": Held(torch.ones(1))}, {})
        writer.wait()
        found = Reader(checkpoint.read(checkpoint.path_of(tmp_path, step))).read("x")
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_not_finite_is_found(bad: float, dtype: torch.dtype) -> None:
    """The largest finite numbers are, whose squares are not."""
    large = torch.full((1000, 3), torch.finfo(dtype).max, dtype=dtype, device=DEVICE)
    tensors = [large, torch.zeros(0, 3, device=DEVICE), torch.tensor(2.0, device=DEVICE)]
    assert all_finite(tensors)
    large[-1, -1] = bad
    assert not all_finite(tensors)
    assert not all_finite([torch.tensor(bad, device=DEVICE)])
    assert all_finite([])
