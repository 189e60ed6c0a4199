"""The recipes of ViT load, have the published sizes, and learn."""

import importlib

import ml_collections
import pytest
import torch

from flashtrain.data.images import load_images
from flashtrain.models.vit import ViT, ViTConfig
from flashtrain.train.config import RunConfig

# Layers, width, heads, parameters.
IMAGENET = {
    "ti": (12, 192, 3, 5_717_416),
    "s": (12, 384, 6, 22_050_664),
    "": (12, 768, 12, 86_567_656),
    "l": (24, 1024, 16, 304_326_632),
}


def load(name: str, arg: str | None = None) -> ml_collections.ConfigDict:
    config = importlib.import_module(f"experiments.configs.{name}").get_config(arg)
    assert config.is_locked
    run = RunConfig.from_mapping(name, config.to_dict())
    assert run.optim.warmup_steps < run.trainer.max_steps
    return config


def model_options(config: ml_collections.ConfigDict) -> dict:
    options = config.model.to_dict()
    assert options.pop("family") == "vit"
    return options


@pytest.mark.parametrize(("arg", "row"), IMAGENET.items())
def test_imagenet_has_the_published_sizes(arg, row):
    config = load("vit_b_imagenet", arg)
    num_layers, d_model, num_heads, parameters = row
    assert config.model.num_layers == num_layers
    assert config.model.d_model == d_model
    assert config.model.num_heads == num_heads
    with torch.device("meta"):
        model = ViT(ViTConfig(**{**model_options(config), "fused": False}))
    assert model.num_parameters(with_positions=True) == parameters
    # 90 epochs of 1,281,167 images
    assert config.trainer.max_steps * 1024 == pytest.approx(90 * 1_281_167, rel=1e-3)
    assert not load("vit_b_imagenet", f"{arg},plain").model.fused


def test_digits_learn():
    """The recipe's model on its data; by chance 10% would be right, with a deviation of 1.6%."""
    config = load("vit_digits")
    torch.manual_seed(0)
    model = ViT(ViTConfig(**{**model_options(config), "drop_path": 0.0}))
    dataset = load_images(source="digits", seed=config.data.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=config.optim.betas)
    for step in range(100):
        loss = model(*dataset.train_samples(64 * step, 64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        correct = sum((model(x).argmax(-1) == y).sum() for x, y in dataset.val_batches(128))
    assert correct / dataset.num_val > 0.2


@pytest.mark.parametrize(
    ("name", "arg", "message"),
    [
        ("vit_digits", "l", "vit_digits has no variant 'l'"),
        ("vit_b_imagenet", "xl", "vit_b_imagenet has no variant 'xl'; supported: l, plain, s, ti"),
        ("vit_b_imagenet", "s,l", "vit_b_imagenet takes one size, got l and s"),
    ],
)
def test_unknown_variants_are_refused_by_one_line(name, arg, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(name, arg)
    assert "\n" not in str(caught.value)
