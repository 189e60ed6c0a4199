"""Every recipe and every variant of it loads, is consistent, and trains one step when made tiny."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import train_binary
from absl import flags

from experiments import command_line
from experiments import train as program
from flashtrain.errors import UserError
from flashtrain.models.gpt import GPTConfig
from flashtrain.models.vit import ViTConfig
from flashtrain.train.config import RunConfig
from flashtrain.train.loop import train

TINY_GPT = (
    "--config.model.vocab_size=256",
    "--config.model.max_seq_len=16",
    "--config.data.seq_len=16",
)
TINY_VIT = (
    "--config.data.source=digits",
    "--config.model.image_size=0",
    "--config.model.patch_size=2",
    "--config.model.num_channels=0",
    "--config.model.num_classes=0",
)
TINY = (
    "--config.model.num_layers=1",
    "--config.model.num_heads=2",
    "--config.model.d_model=16",
    "--config.data.batch_size=1",
    "--config.trainer.global_batch_size=2",
    "--config.trainer.max_steps=1",
    "--config.trainer.sample_tokens=2",
    "--config.trainer.compile=false",  # on a CPU it needs a C++ compiler and half a minute
    "--config.trainer.device=cpu",
)


def parse(*arguments: str) -> RunConfig:
    parsed = command_line.parse(
        ["train", *arguments], "configs/quickstart.py", flags.FlagValues(), program.defaults
    )
    return RunConfig.from_mapping(parsed.name, parsed.config)


def recipes() -> list[str]:
    """Every recipe, alone and with each of its variants."""
    found = []
    for path in command_line.recipes():
        name = f"configs/{path.name}"
        found.append(name)
        with pytest.raises(UserError) as refusal:
            parse(f"--config={name}:no_such_variant")
        supported = re.search(r"supported: (.*)", str(refusal.value))
        if supported:
            found += [f"{name}:{variant}" for variant in supported.group(1).split(", ")]
    return found


RECIPES = recipes()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_binary.make_data(tmp_path_factory.mktemp("data") / "words")


def test_there_are_recipes_with_variants() -> None:
    assert "configs/quickstart.py" in RECIPES
    assert "configs/gpt2s.py:plain" in RECIPES
    assert "configs/gpt3l.py:rotary" in RECIPES
    assert "configs/vit_b_imagenet.py:l" in RECIPES


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_is_consistent(recipe: str) -> None:
    config = parse(f"--config={recipe}")
    options = dict(config.model)
    family = options.pop("family")
    if family == "gpt":
        GPTConfig(**options)
        assert config.model["max_seq_len"] == config.data["seq_len"]
    else:
        ViTConfig(**options)
    assert config.optim.warmup_steps < config.trainer.max_steps


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_trains_a_tiny_step(
    recipe: str,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_gpt = parse(f"--config={recipe}").model["family"] == "gpt"
    shape = (*TINY_GPT, data) if is_gpt else TINY_VIT
    config = parse(f"--config={recipe}", *TINY, *shape)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # keeps the trainer from taking every core
    torch.set_num_threads(1)
    train(config, tmp_path / "run", command=["train"])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["step"] == 1
    assert summary["config"]["name"] == recipe.removeprefix("configs/").replace(".py", "").replace(
        ":", "-"
    )
    # An untrained model knows nothing. One step of a tiny batch changes little.
    nothing = math.log(256 if is_gpt else 10)
    assert summary["train/loss"] == pytest.approx(nothing, abs=0.1)
    assert summary["val/loss"] == pytest.approx(nothing, abs=0.5)
