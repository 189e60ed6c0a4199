from typing import Any

import pytest

from flashtrain.errors import UserError
from flashtrain.train.batches import BatchPlan, micro_batches
from flashtrain.train.config import RunConfig


def plan(ranks: int = 1, micro: int = 4, **trainer: Any) -> BatchPlan:
    sections = {"data": {"batch_size": micro}, "trainer": trainer}
    return BatchPlan(RunConfig.from_mapping("test", sections), ranks)


@pytest.mark.parametrize(
    ("total", "micro", "ranks", "expected"),
    [
        (16, 4, 1, (4, 4)),
        (16, 4, 2, (4, 2)),
        (16, 16, 2, (8, 1)),
        (16, 64, 1, (16, 1)),
        (3, 1, 3, (1, 1)),
    ],
)
def test_global_batch_is_kept(total: int, micro: int, ranks: int, expected: tuple) -> None:
    batches = plan(ranks, micro, global_batch_size=total)
    cut = batches.cut(5)
    assert (cut.micro, cut.accumulation) == expected
    assert cut.micro * cut.accumulation * ranks == total == batches.size(5)
    assert batches.first_sample(5) == 5 * total
    assert batches.accumulates == (expected[1] > 1)


def test_uneven_batches_are_refused() -> None:
    with pytest.raises(UserError, match=r"that fit: 4 or 6; .*batch_size: 10 or 15"):
        plan(micro=5, global_batch_size=12)
    with pytest.raises(UserError, match="evenly by 5 processes; the nearest that can: 10 or 15"):
        plan(5, global_batch_size=12)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ramp(ranks: int) -> None:
    batches = plan(ranks, micro=2, global_batch_size=32, batch_ramp_from=8, batch_ramp_steps=9)
    sizes = [batches.size(step) for step in range(15)]
    assert sizes == [8] * 3 + [16] * 3 + [24] * 3 + [32] * 6
    assert [batches.first_sample(s) for s in range(15)] == [sum(sizes[:s]) for s in range(15)]
    for step in range(15):
        cut = batches.cut(step)
        assert cut.micro * cut.accumulation * ranks == sizes[step]
        samples = [
            sample
            for index in range(cut.accumulation * ranks)
            for sample in batches.micro_batch_samples(step, index)
        ]
        first = batches.first_sample(step)
        assert samples == list(range(first, first + sizes[step]))


def test_ramp_shorter_than_its_stages_reaches_the_end() -> None:
    batches = plan(micro=1, global_batch_size=16, batch_ramp_from=1, batch_ramp_steps=4)
    assert [batches.size(step) for step in (0, 4, 100)] == [1, 16, 16]
    assert batches.first_sample(5) == sum(batches.size(step) for step in range(5))


def test_ramp_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"=5, by which the batch grows; .*: 15 or 20"):
        plan(global_batch_size=16, batch_ramp_from=5, batch_ramp_steps=10)
    with pytest.raises(UserError, match="batch_ramp_from=2 cannot be shared evenly by 4"):
        plan(4, global_batch_size=16, batch_ramp_from=2, batch_ramp_steps=10)


def test_micro_batches_divide_every_stage() -> None:
    def choices(ranks: int, **trainer: Any) -> list[int]:
        return micro_batches(RunConfig.from_mapping("test", {"trainer": trainer}), ranks)

    assert choices(2, global_batch_size=8) == [1, 2, 4]
    ramp = {"batch_ramp_from": 8, "batch_ramp_steps": 4}
    assert choices(2, global_batch_size=24, **ramp) == [1, 2, 4]
    with pytest.raises(UserError, match="evenly by 3 processes"):
        choices(3, global_batch_size=8)
