"""What a model is made of is in its state dict: from the meta device, in copies and conversions.

Public reports of the kind: huggingface/transformers#34234, pytorch/torchtitan#1371.
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashtrain.models.gpt import GPT
from flashtrain.models.gpt_reference import OPTIONS, random_tokens, tiny, tiny_config
from flashtrain.models.vit import ViT, ViTConfig

VIT: dict[str, Any] = {
    **{"image_size": 8, "patch_size": 4, "num_channels": 1, "num_classes": 5},
    **{"num_layers": 2, "d_model": 12, "num_heads": 2, "layer_scale": 0.1},
}
GARBAGE = 7.25  # what memory held before


def build(name: str) -> nn.Module:
    if name == "vit":
        return ViT(ViTConfig(**VIT))
    return GPT(tiny_config(**OPTIONS[name]))


def random(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = build(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def outputs(model: nn.Module) -> Tensor:
    dtype = next(model.parameters()).dtype
    is_vit = isinstance(model, ViT)
    images = torch.linspace(-1, 1, 128, dtype=dtype).view(2, 1, 8, 8)
    with torch.no_grad():
        return model(images if is_vit else random_tokens())


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return build(name).eval()


@torch.no_grad()
def from_meta(name: str) -> nn.Module:
    model = on_meta(name).to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.fill_(GARBAGE)
    return model


WAYS: dict[str, Callable[[str, nn.Module], nn.Module]] = {
    "deepcopy": lambda name, model: copy.deepcopy(model),
    "pickle": lambda name, model: pickle.loads(pickle.dumps(model)),
}


def loaded(name: str, model: nn.Module) -> nn.Module:
    other = from_meta(name)
    other.load_state_dict(model.state_dict())
    return other


def assigned(name: str, model: nn.Module) -> nn.Module:
    other = on_meta(name)
    other.load_state_dict(model.state_dict(), assign=True)
    return other


WAYS |= {"to_empty": loaded, "assign": assigned}


@pytest.mark.parametrize("name", [*OPTIONS, "vit"])
@pytest.mark.parametrize("way", WAYS)
def test_copies_compute_the_same(way: str, name: str) -> None:
    model = random(name)
    other = WAYS[way](name, model)
    assert torch.equal(outputs(other), outputs(model))
    if isinstance(other, GPT):
        is_tied = other.head.weight is other.embedding.tokens.weight
        assert is_tied == other.config.tie_embeddings
    assert sum(p.numel() for p in other.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", [*OPTIONS, "vit"])
def test_reset_parameters_draws_a_new_model(name: str) -> None:
    torch.manual_seed(1)
    expected = build(name)
    reset = from_meta(name)
    torch.manual_seed(1)
    reset.reset_parameters()
    for (key, parameter), other in zip(
        expected.named_parameters(), reset.parameters(), strict=True
    ):
        if "class_token" not in key:
            assert not (other == GARBAGE).any(), key
        if "norm" in key:  # the others are drawn in another order than when the model was built
            assert torch.equal(other, parameter), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_alibi_keeps_its_slopes_in_a_low_precision(dtype: torch.dtype, fused: bool) -> None:
    """The slopes of 12 heads are no powers of two: rounded to 8 bits, they are off by 0.2%."""
    model = tiny(alibi=True, num_heads=12, fused=fused)
    model.to(dtype).float()
    with torch.no_grad():  # the weights are rounded, the slopes are not
        expected = tiny(alibi=True, num_heads=12, fused=fused)
        expected.load_state_dict(model.state_dict())
        assert torch.equal(model(random_tokens()), expected(random_tokens()))


def test_an_untied_state_does_not_go_into_a_tied_model() -> None:
    untied = tiny(tie_embeddings=False)
    with pytest.raises(RuntimeError, match=r"head.weight differs from .*tie_embeddings=False"):
        tiny().load_state_dict(untied.state_dict())
    tied = tiny(seed=1)
    untied.load_state_dict(tied.state_dict())  # the other way is no loss
    assert torch.equal(untied(random_tokens()), tied(random_tokens()))


def test_no_module_has_buffers() -> None:
    """One that no state dict holds is lost on the way through the meta device."""
    for name in (*OPTIONS, "vit"):
        assert not list(build(name).buffers()), name
