"""Every recipe and every variant of it loads, agrees with the tables and trains."""

import importlib
import itertools

import ml_collections
import pytest
import torch

from flashtrain.models.gpt import GPT, GPTConfig
from flashtrain.train.config import RunConfig
from flashtrain.train.schedule import learning_rate

# Layers, width, heads, learning rate, sequences per step, parameters (with a vocabulary of 50,257).
GPT2 = {
    "gpt2s": (12, 768, 12, 6e-4, 512, 124_439_808),
    "gpt2m": (24, 1024, 16, 1.5e-4, 512, 354_823_168),
    "gpt2l": (36, 1280, 20, 1.5e-4, 512, 774_030_080),
    "gpt2xl": (48, 1600, 25, 1.5e-4, 512, 1_557_611_200),
}
GPT3 = {
    "gpt3s": (12, 768, 12, 6e-4, 256, 125_226_240),
    "gpt3m": (24, 1024, 16, 3e-4, 256, 355_871_744),
    "gpt3l": (24, 1536, 16, 2.5e-4, 256, 760_300_032),
    "gpt3xl": (24, 2048, 16, 2e-4, 512, 1_315_723_264),
    "gpt3_2p7b": (32, 2560, 32, 1.6e-4, 512, 2_651_553_280),
}
SHORT = {name: "60b" if name in ("gpt3xl", "gpt3_2p7b") else "30b" for name in GPT3}
VARIANTS = {
    "quickstart": (),
    **dict.fromkeys(GPT2, ("plain",)),
    **{name: ("plain", "rotary", "8k", SHORT[name]) for name in GPT3},
}
VARIANTS["gpt3_2p7b"] += ("hdim128",)
# No variant, each alone, all at once.
ARGUMENTS = [
    (name, ",".join(words))
    for name, variants in VARIANTS.items()
    for count in sorted({0, min(1, len(variants)), len(variants)})
    for words in itertools.combinations(variants, count)
]


def load(name: str, arg: str | None = None) -> ml_collections.ConfigDict:
    return importlib.import_module(f"experiments.configs.{name}").get_config(arg)


@pytest.mark.parametrize(("name", "arg"), ARGUMENTS)
def test_loads_and_trains_a_step_in_miniature(name, arg):
    config = load(name, arg)
    assert config.is_locked
    run = RunConfig.from_mapping(name, config.to_dict())
    assert run.optim.warmup_steps < run.trainer.max_steps

    torch.manual_seed(0)
    # All options of the recipe but the sizes; plain, so that the kernels need not be there.
    sizes = {"vocab_size": 61, "num_layers": 2, "max_seq_len": 16}
    sizes["d_model"] = 4 * config.model.num_heads
    model = GPT(GPTConfig(**{**config.model.to_dict(), **sizes, "fused": False}))
    tokens = torch.randint(0, 61, (2, 17))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        torch.manual_seed(0)  # the same dropout
        loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]


@pytest.mark.parametrize(("name", "row"), [*GPT2.items(), *GPT3.items()])
def test_sizes_are_those_of_the_tables(name, row):
    num_layers, d_model, num_heads, lr, global_batch_size, parameters = row
    config = load(name)
    assert config.model.num_layers == num_layers
    assert config.model.d_model == d_model
    assert config.model.num_heads == num_heads
    assert config.optim.lr == lr
    assert config.trainer.global_batch_size == global_batch_size
    with torch.device("meta"):
        model = GPT(GPTConfig(**{**config.model.to_dict(), "fused": False}))
    assert model.num_parameters(with_positions=True) == parameters


@pytest.mark.parametrize("name", GPT3)
def test_variants_change_what_they_say(name):
    base, long, short = load(name), load(name, "8k"), load(name, SHORT[name])
    tokens = base.trainer.global_batch_size * base.data.seq_len
    assert long.data.seq_len == long.model.max_seq_len == 8192
    assert long.trainer.global_batch_size * long.data.seq_len == tokens
    assert base.trainer.max_steps * tokens == 800_000 * 2**19
    assert base.optim.cycle_steps * tokens == 600_000 * 2**19
    assert base.optim.warmup_steps * 100 == base.trainer.max_steps
    assert short.trainer.max_steps == short.optim.cycle_steps == 60_000
    assert short.optim.warmup_steps == 600
    rotary = load(name, "rotary").model
    assert (rotary.learned_positions, rotary.rotary_fraction) == (False, 0.5)
    assert (base.model.learned_positions, base.model.rotary_fraction) == (True, 0.0)
    assert base.model.fused
    assert not load(name, "plain").model.fused


def test_heads_of_128():
    assert load("gpt3_2p7b", "hdim128").model.num_heads == 20
    assert load("gpt3_2p7b", "60b,hdim128").model.init_std == 0.0125


def test_large_models_share_the_optimizers_state():
    zero1 = {name for name in (*GPT2, *GPT3) if load(name).trainer.strategy == "zero1"}
    assert zero1 == {"gpt2l", "gpt2xl", "gpt3l", "gpt3xl", "gpt3_2p7b"}


def test_rate_of_gpt3_from_first_to_last_step():
    run = RunConfig.from_mapping("gpt3s", load("gpt3s").to_dict())
    rates = {
        step: learning_rate(step, run.optim, run.trainer.max_steps)
        for step in (0, 7_999, 600_000, 799_999)
    }
    assert rates[0] == pytest.approx(1e-6, rel=0.1)
    assert rates[7_999] == 6e-4
    assert rates[600_000] == rates[799_999] == pytest.approx(6e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_unknown_variants_are_refused_by_one_line(name):
    with pytest.raises(ValueError, match=f"{name} has no variant 'rotery'") as caught:
        load(name, "rotery")
    assert "\n" not in str(caught.value)
    for variant in VARIANTS[name]:
        assert variant in str(caught.value)


def test_loading_asks_no_device(monkeypatch):
    def fail(*args):
        raise AssertionError("a recipe looked at the machine")

    for name in ("is_available", "device_count", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, fail)
    for name in (*VARIANTS, "vit_digits", "vit_b_imagenet"):
        load(name)
