"""Estimates against counting by hand, and on a GPU against the memory of a real step."""

import dataclasses
import gc
import json
from typing import Any

import pytest
import torch

from flashtrain.errors import UserError
from flashtrain.models.gpt import GPT
from flashtrain.testing.devices import DEVICE, cuda_only
from flashtrain.train.build import build_gpt
from flashtrain.train.config import RunConfig
from flashtrain.train.estimate import Estimate, estimate, largest_micro_batch, with_micro_batch

GIB = 2**30


def config(**changes: Any) -> RunConfig:
    sections: dict[str, dict[str, Any]] = {
        "model": {
            "vocab_size": 1000,
            "num_layers": 2,
            "d_model": 64,
            "num_heads": 2,
            "max_seq_len": 128,
        },
        "data": {"source": "shakespeare", "batch_size": 4, "seq_len": 128, "seed": 1},
        "optim": {},
        "trainer": {"max_steps": 10, "global_batch_size": 16, "precision": "bf16"},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        sections[section][name] = value
    return RunConfig.from_mapping("test", sections)


def of(ranks: int = 1, device_memory: int | None = None, **changes: Any) -> Estimate:
    return estimate(config(**changes), ranks, device_memory, peak_flops=None)


def test_counts() -> None:
    found, model = of(), build_gpt(config())
    assert found.parameters == model.num_parameters()
    assert found.flops_per_token == model.flops_per_token(128)
    assert (found.tokens, found.steps, found.accumulation) == (10 * 16 * 128, 10, 4)
    assert found.hours is None
    assert found.fits is None
    count = sum(p.numel() for p in model.parameters())
    assert found.memory.weights == found.memory.gradients == 4 * count
    assert found.memory.optimizer == 8 * count
    timed = estimate(config(), 2, None, peak_flops=1e12)
    assert timed.hours == pytest.approx(found.tokens * found.flops_per_token / 0.9e12 / 3600)


def test_strategies_share_state() -> None:
    whole = of(ranks=4).memory
    zero1 = of(ranks=4, trainer__strategy="zero1").memory
    fsdp2 = of(ranks=4, trainer__strategy="fsdp2").memory
    assert zero1 == dataclasses.replace(whole, optimizer=whole.optimizer // 4)
    assert fsdp2.weights == whole.weights // 4
    assert fsdp2.gradients == whole.gradients // 4
    low = of(trainer__low_precision_weights=True).memory
    assert (low.weights, low.optimizer) == (whole.weights // 2, whole.optimizer * 3 // 2)


def test_activations_grow_with_layers_and_micro_batch() -> None:
    """Each token of each layer keeps 32 D bytes or so in bf16: 4 D of the two norms' inputs, 4 D of
    their outputs, 8 D of attention, 16 D of the MLP before and after its activation."""
    two, four = of(), of(model__num_layers=4)
    tokens = 4 * 128
    per_token = (four.memory.activations - two.memory.activations) / 2 / tokens
    assert per_token == pytest.approx(32 * 64, rel=0.3)
    double = of(data__batch_size=8)
    ratio = double.memory.activations / two.memory.activations
    assert 1.6 < ratio < 2.1
    plain = of(model__fused=False)
    assert plain.memory.total > two.memory.total


def test_fits() -> None:
    total = of().memory.total
    assert of(device_memory=2 * total).fits is True
    assert of(device_memory=total).fits is False  # nothing would be left for anything else
    assert "does not fit" in of(device_memory=total).text()


@pytest.mark.parametrize("fused", [True, False])
def test_deep_models_are_extrapolated_exactly(fused: bool) -> None:
    """Five blocks from models of two and three, against tracing all five."""
    deep = {"model__num_layers": 5, "model__fused": fused, "trainer__global_batch_size": 4}
    expected = of(**deep)
    whole = (5, 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flashtrain.train.estimate._TRACED_LAYERS", whole)
        assert of(**deep).memory == expected.memory


GIGABYTES = (8, 24, 40, 80, 141)


def test_the_largest_micro_batch_that_fits_is_taken() -> None:
    """GPT-2 small's shape, four blocks deep, on cards of several sizes."""
    changes = {
        "model__num_layers": 4,
        "model__d_model": 768,
        "model__num_heads": 12,
        "model__vocab_size": 50257,
        "model__max_seq_len": 1024,
        "data__seq_len": 1024,
        "trainer__global_batch_size": 512,
    }
    run = config(**changes)
    found = {gb: largest_micro_batch(run, 1, gb * 10**9) for gb in GIGABYTES}
    assert list(found.values()) == sorted(found.values())
    assert found[8] < found[24] < found[80]
    of_24 = {"device_memory": 24 * 10**9, **changes}
    assert of(data__batch_size=found[24], **of_24).fits
    assert not of(data__batch_size=2 * found[24], **of_24).fits


def test_a_given_micro_batch_stays() -> None:
    given = config(data__batch_size=2)
    assert with_micro_batch(given, 1, 10**9) is given
    chosen = with_micro_batch(config(data__batch_size=0), 1, 10**9)
    assert chosen.data["batch_size"] == 16
    assert of(device_memory=10**9, data__batch_size=0).micro_batch == 16


def test_a_model_that_fits_nowhere_is_refused() -> None:
    with pytest.raises(UserError, match=r"one sample needs 0\.0 GiB on each of 1 devices"):
        largest_micro_batch(config(), 1, 10**6)


def test_micro_batch_of_a_vit() -> None:
    sections: dict[str, dict[str, Any]] = {
        "model": {
            "family": "vit",
            "image_size": 32,
            "patch_size": 4,
            "num_channels": 3,
            "num_classes": 10,
            "num_layers": 6,
            "d_model": 64,
            "num_heads": 2,
        },
        "data": {"source": "digits"},
        "trainer": {"global_batch_size": 256, "precision": "bf16"},
    }
    run = RunConfig.from_mapping("vit", sections)
    small, large = (largest_micro_batch(run, 1, memory) for memory in (40 * 10**6, 10**9))
    assert 1 <= small < large == 256


def test_json_and_text_say_the_same() -> None:
    found = of(device_memory=GIB)
    read = json.loads(json.dumps(found.to_dict()))
    assert read["memory_bytes"]["total"] == found.memory.total
    assert f"{found.parameters:,}" in found.text()


def test_other_families_are_refused() -> None:
    with pytest.raises(UserError, match="family gpt, this one is a vit"):
        of(model__family="vit")


@cuda_only
@pytest.mark.parametrize("layers", [2, 6])
def test_estimate_is_what_a_step_takes(layers: int) -> None:
    changes = {
        "model__num_layers": layers,
        "model__d_model": 512,
        "model__num_heads": 8,
        "model__vocab_size": 50257,
        "model__max_seq_len": 1024,
        "data__seq_len": 1024,
        "data__batch_size": 8,
        "trainer__global_batch_size": 8,
    }
    found = of(**changes).memory
    gc.collect()
    before = torch.cuda.memory_allocated(DEVICE)  # by other tests of this process
    model: GPT = build_gpt(config(**changes)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(50257, (8, 1024), device=DEVICE)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats(DEVICE)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(tokens, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    measured = torch.cuda.max_memory_allocated(DEVICE) - before
    assert found.total == pytest.approx(measured, rel=0.1)
