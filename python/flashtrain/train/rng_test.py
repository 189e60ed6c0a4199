import json
import random

import numpy as np
import torch

from flashtrain.train import rng


def draw() -> tuple:
    return random.random(), np.random.rand(), torch.rand(3).tolist()


def test_state_comes_back() -> None:
    rng.seed_everything(3)
    draw()
    state = json.loads(json.dumps(rng.rng_state()))
    first = draw()
    assert draw() != first
    rng.set_rng_state(state)
    assert draw() == first


def test_micro_batches_draw_differently_and_repeatably() -> None:
    drawn: dict[tuple[int, ...], tuple[float, ...]] = {}
    for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)]:
        torch.rand(17)  # what came before does not matter
        rng.seed_micro_batch(*key)
        values = tuple(torch.rand(4).tolist())
        assert drawn.setdefault(key, values) == values
    assert len(set(drawn.values())) == 4
