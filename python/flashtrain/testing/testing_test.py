"""The judges themselves: what they must refuse."""

import pytest
import torch

from flashtrain.testing import tolerances
from flashtrain.testing.devices import DEVICE, poisoned_memory


def test_poisoned_memory() -> None:
    with poisoned_memory():
        like = torch.zeros(3, device=DEVICE, dtype=torch.bfloat16)
        for tensor in (
            torch.empty(1000, device=DEVICE),
            torch.empty_like(like, memory_format=torch.contiguous_format),
            like.new_empty((5, 2), dtype=torch.float32),
        ):
            assert tensor.isnan().all()
        assert (torch.empty(9, device=DEVICE, dtype=torch.uint8) == 255).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_rule_is_two_sided() -> None:
    exact = torch.zeros(4, dtype=torch.float64)
    in_torch = torch.full((4,), 1e-2, dtype=torch.bfloat16)

    def judge(ours: torch.Tensor) -> None:
        tolerances.assert_as_exact_as_torch("z", ours, in_torch, exact, k=2.0)

    judge(in_torch * 1.9)
    judge(-in_torch)
    for ours, message in (
        (in_torch * 2.2, "max error"),
        (in_torch.float(), "dtype"),
        (in_torch[:3], "shape"),
        (torch.where(torch.arange(4) == 2, torch.nan, in_torch), r"not finite, first at \[2\]"),
    ):
        with pytest.raises(AssertionError, match=message):
            judge(ours)


def test_few_numbers_are_pooled() -> None:
    def draw(seed: int, wrong: int = -1) -> tolerances.Draw:
        right = {
            "loss": torch.tensor(float(seed)).double(),
            "few": torch.full((2, 3), float(seed)).double(),
            "none": torch.zeros(0, 3).double(),
            "many": torch.zeros(50).double(),
        }
        ours = {name: value.float() for name, value in right.items()}
        if seed == wrong:
            ours["many"] = ours["many"][:49]
        return ours, ours, right

    ours, _, exact = tolerances.pooled(draw, but_for=["loss"])
    assert ours["few"].tolist() == [float(seed) for seed in range(11) for _ in range(6)]
    assert [exact[name].numel() for name in ("loss", "none", "many")] == [11, 0, 550]
    with pytest.raises(AssertionError, match="many: shape"):
        tolerances.pooled(lambda seed: draw(seed, wrong=7), but_for=["loss"])
    single, _, _ = tolerances.pooled(draw, but_for=["loss", "few", "many"])
    assert single["few"].shape == (2, 3)


def test_the_rule_takes_empty_tensors() -> None:
    empty = torch.zeros(0)
    tolerances.assert_as_exact_as_torch("z", empty, empty, empty.double(), k=2.0)
