import json

import torch

from flashtrain.train.precision import LossScale

CPU = torch.device("cpu")


def test_loss_scale_is_torchs() -> None:
    """torch.amp.GradScaler's dynamics, over overflows and long good stretches."""
    scale = LossScale(CPU, enabled=True)
    reference = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    overflows = {0, 1, 2, 700, 2701, 5000}
    for step in range(7100):
        overflow = step in overflows
        reference.scale(torch.zeros(1))
        parameter.grad = torch.full((1,), torch.inf if overflow else 1.0)
        reference.step(optimizer)
        reference.update()
        scale.update(torch.tensor(overflow))
        assert scale.scale.item() == reference.get_scale(), step


def test_loss_scale_comes_back() -> None:
    scale, other = LossScale(CPU, enabled=True), LossScale(CPU, enabled=True)
    for overflow in [True, *[False] * 1500]:
        scale.update(torch.tensor(overflow))
    other.load_state(json.loads(json.dumps(scale.state())))
    for _ in range(600):
        for each in (scale, other):
            each.update(torch.tensor(False))
    assert other.scale.item() == scale.scale.item() == 2.0**16
    assert other.state() == scale.state()


def test_there_is_none_in_other_precisions() -> None:
    scale = LossScale(CPU, enabled=False)
    scale.update(torch.tensor(True))
    scale.load_state({"scale": 4.0, "good_steps": 1})
    assert scale.scale.item() == 1.0
