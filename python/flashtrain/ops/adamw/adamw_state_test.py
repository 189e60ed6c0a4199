"""FusedAdamW whose parameters, groups and hyperparameters the user changes between steps."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flashtrain.ops.adamw import FusedAdamW, global_grad_norm
from flashtrain.ops.reference.adamw import current_master
from flashtrain.testing.devices import DEVICE, needs_gpu_memory

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
LOW = pytest.mark.parametrize("dtype", [FP16, BF16])


def parameter(dtype: torch.dtype = FP32, shape: tuple[int, ...] = (5, 33)) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()


def step(optimizer: FusedAdamW, seed: int, **options: Any) -> None:
    torch.manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, device=DEVICE).to(p.dtype)
    optimizer.step(**options)


# --- Weights that were written --------------------------------------------------------------------


def _load(p: Tensor) -> None:
    p.data.copy_(torch.full_like(p, 5.0))


def _clamp(p: Tensor) -> None:
    p.data.clamp_(-0.3, 0.3)


def _write_one(p: Tensor) -> None:
    p.data[2, 7] = -1.5


def _replace(p: Tensor) -> None:
    p.data = torch.linspace(-2, 2, p.numel(), device=DEVICE).to(p.dtype).view(p.shape)


@LOW
@pytest.mark.parametrize("change", [_load, _clamp, _write_one, _replace])
def test_a_step_moves_the_weights_that_are_there(
    dtype: torch.dtype, change: Callable[[Tensor], None]
) -> None:
    """Masters follow what was written, element by element; the others keep their bits."""
    p = parameter(dtype)
    optimizer = FusedAdamW([p], lr=1e-3)
    step(optimizer, 1)
    before = p.detach().clone()
    state = {key: value.clone() for key, value in optimizer.state[p].items()}
    change(p)
    expected = current_master(p.detach(), state["master"])
    written = p.detach() != before
    assert torch.equal(expected[written], p.detach().float()[written])
    assert torch.equal(expected[~written], state["master"][~written])
    other = expected.clone().requires_grad_()
    reference = FusedAdamW([other], lr=1e-3)
    del state["master"]
    reference.state[other] = state
    step(optimizer, 2)
    other.grad = p.grad.float()
    reference.step()
    tolerance = 0.0 if DEVICE.type == "cpu" else 1e-6  # of products that a compiler contracts
    torch.testing.assert_close(
        optimizer.state[p]["master"], other.detach(), rtol=tolerance, atol=tolerance
    )
    assert torch.equal(p, optimizer.state[p]["master"].to(dtype))


@LOW
def test_a_skipped_step_leaves_masters_alone(dtype: torch.dtype) -> None:
    p = parameter(dtype)
    optimizer = FusedAdamW([p])
    step(optimizer, 1)
    master = optimizer.state[p]["master"].clone()
    _clamp(p)
    step(optimizer, 2, skip=torch.ones((), device=DEVICE))
    assert torch.equal(optimizer.state[p]["master"], master)


@LOW
def test_weights_swapped_out_and_in_keep_their_masters(dtype: torch.dtype) -> None:
    """As for a validation with averaged weights."""
    ours, theirs = parameter(dtype), parameter(dtype)
    optimizer, other = FusedAdamW([ours]), FusedAdamW([theirs])
    for seed in range(3):
        step(optimizer, seed)
        step(other, seed)
        mine = ours.detach().clone()
        _load(ours)
        ours.data.copy_(mine)
    assert torch.equal(optimizer.state[ours]["master"], other.state[theirs]["master"])


@LOW
def test_nan_stays_where_it_was_written(dtype: torch.dtype) -> None:
    p = parameter(dtype)
    optimizer = FusedAdamW([p])
    step(optimizer, 1)
    p.data[1, 3] = math.nan
    for seed in range(2, 4):
        step(optimizer, seed)
        assert p.isnan().sum() == optimizer.state[p]["master"].isnan().sum() == 1


@needs_gpu_memory(1)
@LOW
def test_a_captured_step_follows_too(dtype: torch.dtype) -> None:
    p = parameter(dtype)
    optimizer = FusedAdamW([p], lr=1e-3)
    step(optimizer, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    _load(p)
    graph.replay()
    assert (p.float() - 5.0).abs().max() < 0.05


# --- Groups ---------------------------------------------------------------------------------------


def test_empty_groups_anywhere() -> None:
    first, last = parameter(), parameter(BF16)
    empty: dict[str, Any] = {"params": [], "weight_decay": 0.0}
    optimizer = FusedAdamW([empty, {"params": [first], "lr": 1e-2}, dict(empty)])
    optimizer.add_param_group(dict(empty))
    optimizer.add_param_group({"params": [last]})
    before = first.detach().clone(), last.detach().clone()
    step(optimizer, 1, max_norm=1.0, grad_norm=torch.ones((), device=DEVICE))
    assert not torch.equal(first, before[0])
    assert not torch.equal(last, before[1])
    assert optimizer.skipped_steps.device == first.device
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    step(optimizer, 2)


def test_only_empty_groups() -> None:
    optimizer = FusedAdamW([{"params": []}])
    optimizer.step()
    assert optimizer.skipped_steps == 0
    p = parameter()
    optimizer.add_param_group({"params": [p]})
    step(optimizer, 1, skip=torch.ones((), device=DEVICE))
    assert optimizer.skipped_steps == 1
    assert optimizer.skipped_steps.device == p.device


def test_no_gradients_before_and_after_the_first_step() -> None:
    p = parameter()
    optimizer = FusedAdamW([p, parameter()])
    optimizer.step()
    assert not optimizer.state
    step(optimizer, 1)
    before = p.detach().clone()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(p, before)


# --- Hyperparameters ------------------------------------------------------------------------------

_WRONG = [
    ("lr", math.nan, "lr: got nan; supported: at least 0 and less than 3.4"),
    ("lr", math.inf, "lr: got inf; supported"),
    ("lr", 1e39, "lr: got 1e\\+39; supported"),
    ("lr", torch.tensor(math.nan), "lr: got nan; supported"),
    ("weight_decay", math.nan, "weight_decay: got nan; supported"),
    ("weight_decay", math.inf, "weight_decay: got inf; supported"),
    ("eps", math.nan, "eps: got nan; supported"),
    ("eps", math.inf, "eps: got inf; supported"),
    ("betas", (math.nan, 0.9), r"betas\[0\]: got nan; supported"),
    ("betas", (0.9, math.inf), r"betas\[1\]: got inf; supported"),
]


@pytest.mark.parametrize(("name", "value", "message"), _WRONG)
def test_numbers_that_are_not_finite_are_refused_whenever_they_come(
    name: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        FusedAdamW([parameter()], **{name: value})
    p = parameter()
    optimizer = FusedAdamW([p])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [parameter()], name: value})
    assert len(optimizer.param_groups) == 1
    step(optimizer, 1)
    before = p.detach().clone()
    right = optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=message):
        step(optimizer, 2)
    assert torch.equal(p, before)
    optimizer.param_groups[0][name] = right
    step(optimizer, 3)


def test_scales_that_make_nan_are_refused_or_skipped() -> None:
    p = parameter()
    optimizer = FusedAdamW([p])
    step(optimizer, 1)
    before = p.detach().clone()
    for count, scale in enumerate((0.0, math.inf, math.nan), 1):
        with pytest.raises(ValueError, match="grad_scale: got"):
            step(optimizer, 2, grad_scale=scale)
        step(optimizer, 2, grad_scale=torch.tensor(scale, device=DEVICE))
        assert optimizer.skipped_steps == count
    assert torch.equal(p, before)


# --- State that fits what the parameter has become ------------------------------------------------


def test_a_parameter_of_another_dtype() -> None:
    """A master comes with low precision and goes without it."""
    p = parameter()
    optimizer = FusedAdamW([p])
    step(optimizer, 1)
    p.data = p.data.to(BF16)
    p.grad = None
    step(optimizer, 2)
    assert torch.equal(p, optimizer.state[p]["master"].to(BF16))
    p.grad = None
    p.data = p.data.to(FP32)
    step(optimizer, 3)
    assert set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.state[p]["step"] == 3


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_parameter_in_another_order_of_memory(dtype: torch.dtype) -> None:
    ours, theirs = (parameter(dtype, (2, 3, 4, 5)) for _ in range(2))
    optimizer, other = FusedAdamW([ours]), FusedAdamW([theirs])
    for seed in range(3):
        step(optimizer, seed)
        step(other, seed)
        ours.grad = None
        ours.data = ours.data.to(memory_format=torch.channels_last)
    assert torch.equal(ours, theirs)
    assert torch.equal(optimizer.state[ours]["exp_avg"], other.state[theirs]["exp_avg"])


def test_state_is_ordinary_whatever_the_mode_of_the_first_step() -> None:
    p = parameter(BF16)
    optimizer = FusedAdamW([p])
    p.grad = torch.ones_like(p)
    with torch.inference_mode():
        optimizer.step()
    assert not any(value.is_inference() for value in optimizer.state[p].values())
    assert not optimizer.skipped_steps.is_inference()
    other = FusedAdamW([parameter()])
    with FakeTensorMode():
        assert type(other.skipped_steps) is Tensor
    step(other, 1)


def test_a_first_step_that_fails_leaves_no_half_of_a_state() -> None:
    p = parameter(shape=(4, 6))
    p.data = p.data[:, :3]  # gaps
    optimizer = FusedAdamW([p])
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="gaps"):
        optimizer.step()
    p.data = p.data.contiguous()
    step(optimizer, 1)
    assert optimizer.state[p]["step"] == 1


def test_a_pickled_optimizer_continues() -> None:
    p = parameter(BF16)
    optimizer = FusedAdamW([p])
    step(optimizer, 1)
    other = pickle.loads(pickle.dumps(optimizer))
    step(optimizer, 2)
    step(other, 2)
    assert torch.equal(other.param_groups[0]["params"][0], p)


@needs_gpu_memory(1)
def test_parameters_that_moved_to_the_gpu() -> None:
    p = torch.randn(5, 3).requires_grad_()
    optimizer = FusedAdamW([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.data, p.grad = p.data.to(DEVICE), None
    optimizer.load_state_dict(optimizer.state_dict())  # torch moves state along
    step(optimizer, 1)
    assert optimizer.skipped_steps.device == p.device


# --- Tensors that are not what they seem ----------------------------------------------------------


def test_views_with_a_negative_bit() -> None:
    value = torch.randn(7, device=DEVICE)
    with pytest.raises(ValueError, match="number 0: got a view with a negative bit; supported"):
        FusedAdamW([torch._neg_view(value).requires_grad_()])
    ours, theirs = (parameter(shape=(7,)) for _ in range(2))
    ours.grad, theirs.grad = torch._neg_view(value), -value
    FusedAdamW([ours]).step()
    FusedAdamW([theirs]).step()
    assert torch.equal(ours, theirs)
    assert global_grad_norm([torch._neg_view(value)]) == global_grad_norm([value])


def test_fake_tensors_are_refused_in_a_line() -> None:
    with FakeTensorMode():
        fake = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match="number 0: got a fake tensor on cpu; supported: dense"):
        FusedAdamW([fake])
    with pytest.raises(ValueError, match=r"grads\[0\]: got a fake tensor on cpu; supported: dense"):
        global_grad_norm([fake])
    p = parameter()
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"skip: got .* fake; supported: one real number"):
        FusedAdamW([p]).step(skip=fake[0])


def test_parameters_that_share_memory_are_refused() -> None:
    base = torch.zeros(10, device=DEVICE)
    optimizer = FusedAdamW([base[:6].requires_grad_(), base[4:].detach().requires_grad_()])
    with pytest.raises(ValueError, match="parameter 1: param shares memory with that of parameter"):
        step(optimizer, 1)
    assert not base.any()
