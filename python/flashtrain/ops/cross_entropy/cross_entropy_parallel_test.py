"""cross_entropy with the classes spread over processes, against one process that has them all."""

from __future__ import annotations

import pathlib

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from flashtrain.ops.cross_entropy import CrossEntropyLoss, cross_entropy_loss
from flashtrain.ops.cross_entropy.cases import BF16, FP32, Case, row_gradients

_CASES = {
    "plain": Case((13, 96), FP32),
    "bf16": Case((2, 7, 96), BF16),
    "all options": Case(
        (13, 96), FP32, torch.int32, label_smoothing=0.1, logit_scale=0.7, lse_square_scale=0.01
    ),
    "padding": Case((13, 96), FP32, vocab_size=89, label_smoothing=0.1),
    "a process of padding alone": Case((13, 96), FP32, vocab_size=40),
    "in place": Case((13, 96), BF16, inplace_backward=True),
}


def _check(case: Case, group: dist.ProcessGroup) -> None:
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    logits, labels = case.inputs()
    expected, expected_z = cross_entropy_loss(logits, labels, **case.options())
    dlosses = row_gradients(expected)
    (expected_grad,) = torch.autograd.grad(expected, logits, dlosses)

    def mine(tensor: Tensor) -> Tensor:
        return tensor.detach().chunk(world_size, -1)[rank].clone()

    shard = mine(logits).requires_grad_()
    losses, z_losses = cross_entropy_loss(
        shard,
        labels,
        inplace_backward=case.inplace_backward,
        process_group=group,
        **case.options(),
    )
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(z_losses, expected_z, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(losses, shard, dlosses)
    rtol = 2**-7 if case.dtype is BF16 else 1e-5
    torch.testing.assert_close(grad, mine(expected_grad), rtol=rtol, atol=1e-6)


def _check_all_ignored(group: dist.ProcessGroup) -> None:
    logits = torch.randn(3, 8, requires_grad=True)
    labels = torch.full((3,), -100)
    loss = CrossEntropyLoss(process_group=group, lse_square_scale=0.1)(logits, labels)
    assert loss == 0
    loss.backward()
    assert (logits.grad == 0).all()


def _check_precomputed_lse(group: dist.ProcessGroup) -> None:
    case = _CASES["plain"]
    logits, labels = case.inputs()
    shard = logits.detach().chunk(dist.get_world_size(group), -1)[dist.get_rank(group)]
    lse = torch.logsumexp(shard, -1)
    torch.testing.assert_close(
        cross_entropy_loss(shard, labels, lse, process_group=group)[0],
        case.ours(logits, labels)[0],
        rtol=1e-5,
        atol=1e-6,
    )


def _run(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    group = dist.group.WORLD
    assert group is not None
    for case in _CASES.values():
        _check(case, group)
    _check_all_ignored(group)
    _check_precomputed_lse(group)
    pathlib.Path(folder, f"done_{rank}").touch()
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4])
def test_classes_over_processes(world_size: int, tmp_path: pathlib.Path) -> None:
    mp.spawn(_run, args=(world_size, str(tmp_path)), nprocs=world_size)
    assert len(list(tmp_path.glob("done_*"))) == world_size


def test_a_group_of_one_process_is_none(tmp_path: pathlib.Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        _check(_CASES["padding"], dist.group.WORLD)
    finally:
        dist.destroy_process_group()
