"""FusedAdamW and global_grad_norm against fp64 and torch.optim.AdamW."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtrain.ops.adamw import FusedAdamW, global_grad_norm
from flashtrain.ops.reference import adamw as reference
from flashtrain.testing import tolerances
from flashtrain.testing.devices import DEVICE, needs_gpu_memory, poisoned_memory

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPES = [(0,), (), (1,), (3,), (5, 7), (4, 0, 2), (257,), (64, 33), (4096,), (130, 1000)]


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with poisoned_memory():
        yield


def parameters(shapes=SHAPES, dtype: torch.dtype = FP32, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    return [
        torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()
        for shape in shapes
    ]  # fmt: skip


def set_gradients(params: list[Tensor], seed: int, dtype=None, scale: float = 1.0) -> None:
    """The same numbers for the same seed, whatever the parameters' dtype."""
    torch.manual_seed(seed)
    for p in params:
        p.grad = (torch.randn(p.shape, device=DEVICE) * scale).to(dtype or p.dtype)


# --- Numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_against_float64_and_torch(weight_decay: float) -> None:
    """Twice torch's error at most, after many steps."""
    options: dict[str, Any] = {
        "lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay,
    }  # fmt: skip
    ours, theirs = parameters(), parameters()
    exact = [p.detach().double() for p in ours]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in exact]
    optimizer, other = FusedAdamW(ours, **options), torch.optim.AdamW(theirs, **options)
    for step in range(1, 31):
        scale = 10.0 ** (step % 5 - 3)
        set_gradients(ours, step, scale=scale)
        set_gradients(theirs, step, scale=scale)
        optimizer.step()
        other.step()
        for i, p in enumerate(ours):
            exact[i], *moment = reference.adamw_step(
                exact[i], p.grad.double(), *moments[i], step, **options
            )
            moments[i] = (moment[0], moment[1])
    for i, p in enumerate(ours):
        state, their_state = optimizer.state[p], other.state[theirs[i]]
        assert state["step"] == 30
        for name, value, in_torch, right in (
            ("param", p.detach(), theirs[i].detach(), exact[i]),
            ("exp_avg", state["exp_avg"], their_state["exp_avg"], moments[i][0]),
            ("exp_avg_sq", state["exp_avg_sq"], their_state["exp_avg_sq"], moments[i][1]),
        ):
            tolerances.assert_as_exact_as_torch(name, value, in_torch, right, k=2.0)


@pytest.mark.parametrize("grad_dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_low_precision_follows_its_master(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """The masters are those of float32 training with the same gradients, to the bit on the CPU; on
    CUDA the compiler may contract the two kernels' products and sums in different places."""
    tolerance = {"rtol": 0.0, "atol": 0.0}
    if DEVICE.type == "cuda":
        tolerance = {"rtol": 2e-6, "atol": 1e-7}
    if grad_dtype != dtype and not hasattr(torch.zeros(()), "grad_dtype"):
        pytest.skip("this torch wants gradients in the parameter's dtype")
    ours, masters = parameters(dtype=dtype), parameters(dtype=dtype)
    masters = [p.detach().float().requires_grad_() for p in masters]
    optimizer, other = FusedAdamW(ours, lr=1e-3), FusedAdamW(masters, lr=1e-3)
    for _ in range(10):
        for p, master in zip(ours, masters):
            grad = torch.randn(p.shape, device=DEVICE).to(grad_dtype)
            p.grad_dtype = grad_dtype
            p.grad = grad
            master.grad = grad.float()
        optimizer.step()
        other.step()
    for p, expected in zip(ours, masters):
        state = optimizer.state[p]
        master = p.detach() if dtype == FP32 else state["master"]
        torch.testing.assert_close(master, expected.detach(), **tolerance)
        assert torch.equal(p, master.to(dtype))
        assert state["exp_avg"].dtype == FP32
        exp_avg_sq = other.state[expected]["exp_avg_sq"]
        torch.testing.assert_close(state["exp_avg_sq"], exp_avg_sq, **tolerance)


def test_master_keeps_what_low_precision_loses() -> None:
    results = []
    for master_weights in (True, False):
        (p,) = parameters([(1000,)], BF16)
        before = p.detach().clone()
        optimizer = FusedAdamW([p], lr=1e-4, weight_decay=0.0, master_weights=master_weights)
        assert ("master" in optimizer.state[p]) is False
        for _ in range(200):
            p.grad = torch.ones_like(p)
            optimizer.step()
        assert ("master" in optimizer.state[p]) is master_weights
        results.append((before.float() - p.float()).mean().item())
    assert results[0] == pytest.approx(200e-4, rel=0.05)
    assert results[1] < 0.7 * results[0]


def test_groups() -> None:
    """Own rates and decays by group, changed between steps; torch is the judge."""
    ours, theirs = parameters(), parameters()

    def groups(params: list[Tensor]) -> list[dict]:
        return [
            {"params": params[:3], "lr": 0.1, "weight_decay": 0.5},
            {"params": params[3:6], "betas": (0.5, 0.6), "eps": 1e-3},
            {"params": params[6:]},
        ]

    optimizer = FusedAdamW(groups(ours), lr=1e-2)
    other = torch.optim.AdamW(groups(theirs), lr=1e-2)
    for step in range(10):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        for o in (optimizer, other):
            for group in o.param_groups:
                group["lr"] *= 0.9
            o.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q)


def test_learning_rate_on_the_device() -> None:
    ours, theirs = parameters(), parameters()
    lr = torch.tensor(0.0, device=DEVICE)
    optimizer, other = FusedAdamW(ours, lr=lr), FusedAdamW(theirs)
    for step in range(4):
        lr.fill_(0.01 * step)
        other.param_groups[0]["lr"] = 0.01 * step
        for params, o in ((ours, optimizer), (theirs, other)):
            set_gradients(params, step)
            o.step()
    for p, q in zip(ours, theirs):
        assert torch.equal(p, q)


def test_missing_gradients() -> None:
    ours, theirs = parameters(), parameters()
    optimizer, other = FusedAdamW(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2)
    for step in range(6):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        for params in (ours, theirs):
            for i, p in enumerate(params):
                if (i + step) % 3 == 0 or i == 5:
                    p.grad = None
        optimizer.step()
        other.step()
    assert ours[5] not in optimizer.state
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q)
        if p in optimizer.state:
            assert optimizer.state[p]["step"] == other.state[q]["step"].item()


def test_no_gradients_at_all() -> None:
    optimizer = FusedAdamW(parameters())
    optimizer.step()
    assert not optimizer.state


def test_views_of_any_alignment_and_order() -> None:
    flat = torch.randn(5000, device=DEVICE)
    views = [
        flat[1:1000],
        flat[1001:1003],
        flat[1003:2003].view(10, 100).t(),
        flat[2004:4004].view(2, 10, 10, 10).permute(0, 3, 1, 2),
    ]
    ours = [v.detach().requires_grad_() for v in views]
    theirs = [v.detach().clone().requires_grad_() for v in views]
    optimizer, other = FusedAdamW(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2)
    before = flat.clone()
    for step in range(3):
        for i, (p, q) in enumerate(zip(ours, theirs)):
            torch.manual_seed(10 * step + i)
            p.grad = torch.randn(p.shape, device=DEVICE)  # contiguous, whatever p is
            q.grad = p.grad.clone()
        optimizer.step()
        other.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q)
    for untouched in (flat[:1], flat[1000:1001], flat[2003:2004], flat[4004:]):
        start = untouched.storage_offset()
        assert torch.equal(untouched, before[start : start + untouched.numel()])


def test_ten_thousand_tensors() -> None:
    shapes = [(i % 11,) for i in range(10_000)]
    ours, theirs = parameters(shapes), parameters(shapes)
    optimizer, other = FusedAdamW(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2, foreach=True)
    for step in range(2):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        norm = global_grad_norm(p.grad for p in ours)
        expected = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        torch.testing.assert_close(norm, expected)
        optimizer.step(grad_norm=norm, max_norm=1.0)
        other.step()
    torch.testing.assert_close(torch.cat(ours), torch.cat(theirs))


def test_many_groups() -> None:
    params = parameters([(10,)] * 300)
    expected = parameters([(10,)] * 300)
    rates = [1e-4 * i for i in range(300)]
    optimizer = FusedAdamW([{"params": [p], "lr": lr} for p, lr in zip(params, rates)])
    other = torch.optim.AdamW([{"params": [p], "lr": lr} for p, lr in zip(expected, rates)])
    for step in range(2):
        set_gradients(params, step)
        set_gradients(expected, step)
        optimizer.step()
        other.step()
    torch.testing.assert_close(params, expected)


def test_twice_the_same_bits() -> None:
    runs = []
    for _ in range(2):
        params = parameters([(1000, 300), (7,)], BF16)
        optimizer = FusedAdamW(params)
        for step in range(3):
            set_gradients(params, step)
            norm = global_grad_norm(p.grad for p in params)
            optimizer.step(grad_norm=norm, max_norm=0.1)
        runs.append([norm, *params, *(optimizer.state[p]["master"] for p in params)])
    for a, b in zip(*runs):
        assert torch.equal(a, b)


@needs_gpu_memory(60)
def test_more_than_two_to_the_31_elements() -> None:
    p = torch.zeros(2**31 + 5, device=DEVICE).requires_grad_()
    p.grad = torch.zeros_like(p)
    p.grad[-3:] = 2.0
    norm = global_grad_norm([p.grad])
    assert norm.item() == pytest.approx(12**0.5)
    FusedAdamW([p], lr=0.5, weight_decay=0.0).step(grad_norm=norm, max_norm=100.0)
    torch.testing.assert_close(p[-4:], torch.tensor([0.0, -0.5, -0.5, -0.5], device=DEVICE))


# --- Norm -----------------------------------------------------------------------------------------


def test_norm() -> None:
    assert global_grad_norm([]) == 0
    assert global_grad_norm([None, torch.zeros(0, device=DEVICE)]) == 0
    torch.manual_seed(0)
    grads: list[Tensor | None] = [
        torch.randn(shape, device=DEVICE).to(dtype) * 3
        for shape in (*SHAPES, (70_000,))
        for dtype in (FP32, FP16, BF16)
    ]
    grads += [None, torch.randn(40, 50, device=DEVICE).t(), torch.randn(99, device=DEVICE)[::3]]
    norm = global_grad_norm(grads)
    exact = torch.cat([g.double().flatten() for g in grads if g is not None]).norm()
    assert norm.dtype == FP32
    assert norm.shape == ()
    torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_norm_shows_what_is_not_finite(value: float) -> None:
    grads = [torch.ones(5, device=DEVICE), torch.ones(100_001, device=DEVICE, dtype=BF16)]
    grads[1][70_001] = value
    assert not global_grad_norm(grads).isfinite()


# --- Clipping, scaling, skipping ------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_clipping_and_unscaling(max_norm: float, scale: float) -> None:
    ours, theirs = parameters(), parameters()
    optimizer = FusedAdamW(ours, lr=1e-2, eps=1e-3)
    other = torch.optim.AdamW(theirs, lr=1e-2, eps=1e-3)
    for step in range(5):
        set_gradients(ours, step, scale=scale)
        set_gradients(theirs, step)
        norm = global_grad_norm(p.grad for p in ours)
        grad_scale = torch.tensor(scale, device=DEVICE) if step % 2 else scale
        optimizer.step(grad_scale=grad_scale, grad_norm=norm, max_norm=max_norm)
        torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        other.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("why", ["inf", "nan", "skip", "skip (bool)", "found_inf"])
def test_skipped_steps_change_nothing(why: str) -> None:
    params = parameters(dtype=BF16)
    optimizer = FusedAdamW(params, lr=1e-2)
    set_gradients(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    for count in (1, 2):
        set_gradients(params, 1)
        options: dict = {}
        if why in ("inf", "nan"):
            params[3].grad[0] = float(why)
            options["grad_norm"] = global_grad_norm(p.grad for p in params)
        elif why == "found_inf":
            optimizer.found_inf = torch.ones((), device=DEVICE)
        else:
            options["skip"] = torch.tensor(1.0 if why == "skip" else True, device=DEVICE)
        optimizer.step(**options)
        assert optimizer.skipped_steps.item() == count
        for p, old in zip(params, before):
            assert torch.equal(p, old)
        for index, entries in optimizer.state_dict()["state"].items():
            for key, value in entries.items():
                assert torch.equal(value, state[index][key]), (index, key)
    if why == "found_inf":
        del optimizer.found_inf
    set_gradients(params, 2)
    optimizer.step(grad_norm=global_grad_norm(p.grad for p in params))
    assert optimizer.skipped_steps.item() == 2
    assert all(optimizer.state[p]["step"] == 2 for p in params)
    assert not torch.equal(params[-1], before[-1])


def test_with_grad_scaler() -> None:
    """torch's own scaler, with one overflow: the same weights as torch's fused AdamW."""
    ours, theirs = parameters(), parameters()
    pairs = []
    for params, o in (
        (ours, FusedAdamW(ours, lr=1e-2)),
        (theirs, torch.optim.AdamW(theirs, lr=1e-2, fused=True)),
    ):
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=256.0)
        for step in range(6):
            scaler.scale(torch.zeros((), device=DEVICE))  # makes the scale tensor
            set_gradients(params, step, scale=256.0)
            if step == 3:
                params[4].grad[0, 0] = math.inf
            scaler.step(o)
            scaler.update()
        pairs.append((params, scaler.get_scale()))
    assert pairs[0][1] == pairs[1][1] == 128.0
    torch.testing.assert_close(pairs[0][0], pairs[1][0])
