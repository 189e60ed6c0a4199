"""FusedAdamW inside torch: state, copies, closures, CUDA graphs, errors."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor

from flashtrain import _kernels
from flashtrain.ops.adamw import FusedAdamW, global_grad_norm
from flashtrain.testing.devices import DEVICE, cuda_only, poisoned_memory, two_gpus_only

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with poisoned_memory():
        yield


def parameters(dtype: torch.dtype = FP32, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    shapes = ((3, 5), (257,), (0,), ())
    return [torch.randn(s, device=DEVICE).to(dtype).requires_grad_() for s in shapes]


def steps(params: list[Tensor], optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        for p in params:
            p.grad = torch.randn(p.shape, device=DEVICE).to(p.dtype)
        optimizer.step()


# --- State ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("how", ["memory", "file"])
def test_state_continues_to_the_bit(dtype: torch.dtype, how: str) -> None:
    params = parameters(dtype)
    optimizer = FusedAdamW(params, lr=1e-2)
    steps(params, optimizer, range(3))
    saved = {"params": params, "optimizer": optimizer.state_dict()}
    if how == "file":
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    others = [p.detach().clone().requires_grad_() for p in saved["params"]]
    continued = FusedAdamW(others)
    continued.load_state_dict(saved["optimizer"])
    assert continued.param_groups[0]["lr"] == 1e-2
    steps(params, optimizer, range(3, 6))
    steps(others, continued, range(3, 6))
    for p, q in zip(params, others):
        assert torch.equal(p, q)
        for key, value in optimizer.state[p].items():
            assert value.dtype == FP32
            assert torch.equal(value, continued.state[q][key]), key
            assert value.data_ptr() != continued.state[q][key].data_ptr() or p.numel() == 0


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_exchanges_state_with_torch(options: dict) -> None:
    theirs, ours = parameters(), parameters()
    other, optimizer = torch.optim.AdamW(theirs, lr=1e-2, **options), FusedAdamW(ours)
    steps(theirs, other, range(3))
    optimizer.load_state_dict(other.state_dict())
    with torch.no_grad():
        for p, q in zip(ours, theirs):
            p.copy_(q)
    steps(ours, optimizer, range(3, 6))
    steps(theirs, other, range(3, 6))
    torch.testing.assert_close(ours, theirs)
    back = torch.optim.AdamW(theirs, lr=1.0, **options)
    back.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch takes the tensors over
    steps(ours, optimizer, range(6, 8))
    steps(theirs, back, range(6, 8))
    torch.testing.assert_close(ours, theirs)


def test_a_missing_master_is_made_of_the_parameter() -> None:
    params = parameters(BF16)
    optimizer = FusedAdamW(params, master_weights=False)
    steps(params, optimizer, range(2))
    others = [p.detach().clone().requires_grad_() for p in params]
    continued = FusedAdamW(others)
    continued.load_state_dict(optimizer.state_dict())
    for p in others:
        assert torch.equal(continued.state[p]["master"], p.float())
        assert continued.state[p]["step"] == 2


def test_state_of_another_shape_is_refused() -> None:
    params = parameters()
    optimizer = FusedAdamW(params)
    steps(params, optimizer, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg"] = torch.zeros(5)
    before = optimizer.state[params[0]]["exp_avg"].clone()
    with pytest.raises(ValueError, match=r"parameter 0, exp_avg: got shape \[5\]; .*\[3, 5\]"):
        optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], before)
    saved = torch.optim.AdamW(parameters(), amsgrad=True).state_dict()
    with pytest.raises(ValueError, match="amsgrad: got True; supported: False"):
        optimizer.load_state_dict(saved)


def test_state_that_is_replaced_is_followed() -> None:
    """Trainers that restore by name put new tensors into `state`, and new data into parameters."""
    params = parameters()
    optimizer = FusedAdamW(params, lr=1e-2)
    others = parameters()
    expected = FusedAdamW(others, lr=1e-2)
    for seed in range(4):
        for p in params:
            if p in optimizer.state:
                optimizer.state[p] = {k: v.clone() for k, v in optimizer.state[p].items()}
            p.data = p.data.clone()
        steps(params, optimizer, range(seed, seed + 1))
        steps(others, expected, range(seed, seed + 1))
    for p, q in zip(params, others):
        assert torch.equal(p, q)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: o], ids=["deepcopy", "same"])
def test_copies_work(copied) -> None:
    params = parameters(BF16)
    optimizer = FusedAdamW(params, master_weights=False)
    steps(params, optimizer, range(1))
    other = copied(optimizer)
    own = [p for group in other.param_groups for p in group["params"]]
    steps(own, other, range(1, 3))
    assert all(set(other.state[p]) == {"step", "exp_avg", "exp_avg_sq"} for p in own)
    assert all(other.state[p]["step"] == 3 for p in own)


# --- torch's machinery ----------------------------------------------------------------------------


def test_closure() -> None:
    (p,) = (torch.ones(4, device=DEVICE, requires_grad=True),)
    optimizer = FusedAdamW([p], lr=0.1, weight_decay=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    torch.testing.assert_close(p.detach(), torch.full((4,), 0.9, device=DEVICE))


def test_autograd_notices_the_update() -> None:
    p = torch.ones(4, device=DEVICE, requires_grad=True)
    loss = (p * p).sum()
    p.grad = torch.ones_like(p)
    FusedAdamW([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="about CPU threads")
def test_same_bits_for_any_number_of_threads() -> None:
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            p = torch.zeros(100_003, requires_grad=True)
            optimizer = FusedAdamW([p])
            steps([p], optimizer, range(2))
            assert p.grad is not None
            runs.append((p.detach().clone(), global_grad_norm([p.grad])))
            assert _kernels.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for p, norm in runs[1:]:
        assert torch.equal(p, runs[0][0])
        assert torch.equal(norm, runs[0][1])


@cuda_only
def test_one_launch_for_all_tensors() -> None:
    params = [torch.randn(i % 50 + 1, device=DEVICE, requires_grad=True) for i in range(2000)]
    optimizer = FusedAdamW([{"params": params[:900]}, {"params": params[900:], "lr": 0.1}])
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    kernels = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and "Optimizer.step" not in event.name  # torch's own mark around it
    ]
    assert len(kernels) == 1, kernels
    assert "adamw_kernel" in kernels[0]


@cuda_only
def test_never_waits_for_the_device() -> None:
    params = parameters(BF16)
    optimizer = FusedAdamW(params)
    steps(params, optimizer, range(1))
    scale = torch.tensor(2.0, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p)  # elsewhere, perhaps
            norm = global_grad_norm(p.grad for p in params)
            optimizer.step(grad_scale=scale, grad_norm=norm, max_norm=1.0, skip=norm > 1e9)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cuda_only
def test_cuda_graph() -> None:
    """Replays update on, and steps outside the graph in between do not disturb them."""
    params, others = parameters(BF16), parameters(BF16)
    optimizer, expected = FusedAdamW(params, lr=1e-2), FusedAdamW(others, lr=1e-2)
    static = [torch.randn(p.shape, device=DEVICE).to(BF16) for p in params]

    def step() -> None:
        for p, grad in zip(params, static):
            p.grad = grad * 1  # in the graph's own memory
        norm = global_grad_norm(p.grad for p in params)
        optimizer.step(grad_norm=norm, max_norm=1.0)

    def step_expected() -> None:
        for q, grad in zip(others, static):
            q.grad = grad.clone()
        norm = global_grad_norm(q.grad for q in others)
        expected.step(grad_norm=norm, max_norm=1.0)

    step()
    step_expected()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for i in range(4):
        static[1].fill_(float("inf") if i == 2 else float(i))
        graph.replay()
        step_expected()
        if i == 1:
            step()
            step_expected()
        for p, q in zip(params, others):
            assert torch.equal(p, q), i
    assert optimizer.skipped_steps.item() == 1


@cuda_only
def test_runs_in_the_current_stream() -> None:
    p = torch.zeros(4_000_000, device=DEVICE, requires_grad=True)
    p.grad = torch.zeros_like(p)
    optimizer = FusedAdamW([p], lr=1.0, weight_decay=0.0)
    optimizer.step()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        p.grad.fill_(1.0)
        norm = global_grad_norm([p.grad])
        optimizer.step(grad_norm=norm)
        torch.cuda.current_stream().synchronize()
    assert norm.item() == pytest.approx(2000.0)
    assert (p < -0.5).all()


@two_gpus_only
def test_second_device() -> None:
    p = torch.zeros(100, device="cuda:1", requires_grad=True)
    p.grad = torch.ones_like(p)
    norm = global_grad_norm([p.grad])
    FusedAdamW([p], lr=1.0, weight_decay=0.0).step(grad_norm=norm, max_norm=1.0)
    assert torch.allclose(p, torch.full_like(p, -1.0), atol=1e-4)


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr: got -1.0; supported: at least 0"),
        ({"lr": float("nan")}, "lr: got nan"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\]: got 1.0; supported: at least 0 and less than 1"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\]: got -0.1"),
        ({"eps": -1e-8}, "eps: got -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay: got -0.1"),
    ],
)
def test_wrong_hyperparameters(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedAdamW(parameters(), **options)


def test_wrong_parameters() -> None:
    double = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"group 0, number 1: got dtype torch\.float64; supported"):
        FusedAdamW([torch.zeros(1, requires_grad=True), double])
    gaps = torch.zeros(4, 6, device=DEVICE)[:, :3].detach().requires_grad_()
    gaps.grad = torch.zeros(4, 3, device=DEVICE)
    with pytest.raises(ValueError, match="parameter 0: param: got a tensor with gaps"):
        FusedAdamW([gaps]).step()
    other = torch.zeros(3, device="meta", requires_grad=True)
    with pytest.raises(ValueError, match=r"number 1: got a torch\.strided tensor on meta"):
        FusedAdamW([torch.zeros(3, device=DEVICE, requires_grad=True), other])


def test_wrong_arguments_of_step() -> None:
    params = parameters()
    optimizer = FusedAdamW(params)
    steps(params, optimizer, range(1))
    before = [p.detach().clone() for p in params]
    norm = torch.ones((), device=DEVICE)
    for options, message in (
        ({"max_norm": 1.0}, "max_norm: got no grad_norm with it"),
        ({"max_norm": 0.0, "grad_norm": norm}, "max_norm: got 0.0; supported: greater than 0"),
        ({"grad_norm": torch.ones(2, device=DEVICE)}, r"grad_norm: got shape \[2\] on"),
        ({"skip": torch.ones((), device="meta")}, r"skip: got shape \[\] on meta, .*; supported"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.step(**options)
    for p, old in zip(params, before):
        assert torch.equal(p, old)


def test_wrong_types() -> None:
    optimizer = FusedAdamW(parameters())
    with pytest.raises(TypeError, match="max_norm: got str; supported: float or int or None"):
        optimizer.step(max_norm="1")
    with pytest.raises(TypeError, match="grad_norm: got float; supported: Tensor or None"):
        optimizer.step(grad_norm=1.0)
    with pytest.raises(TypeError, match="grads: got NoneType; supported: Iterable"):
        global_grad_norm(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"grads\[0\]: got int; supported: a tensor"):
        global_grad_norm([1])
    for options, message in (
        ({"betas": 0.9}, "betas: got 0.9; supported: two numbers"),
        ({"lr": "0.1"}, "lr: got str; supported: a number"),
        ({"eps": True}, "eps: got bool; supported: a number"),
    ):
        with pytest.raises(TypeError, match=message):
            FusedAdamW(parameters(), **options)


def test_sparse_gradients_are_refused() -> None:
    embedding = torch.nn.Embedding(5, 3, sparse=True, device=DEVICE)
    embedding(torch.tensor([1], device=DEVICE)).sum().backward()
    with pytest.raises(ValueError, match=r"parameter \[5, 3\]: is sparse; supported: dense"):
        FusedAdamW(embedding.parameters()).step()


def test_wrong_gradients_of_the_norm() -> None:
    with pytest.raises(ValueError, match=r"grads\[1\]: got dtype torch.float64"):
        global_grad_norm([torch.zeros(1), torch.zeros(1).double()])
    with pytest.raises(ValueError, match=r"grads\[0\]: got a .* tensor on meta; supported"):
        global_grad_norm([torch.zeros(1, device="meta")])
