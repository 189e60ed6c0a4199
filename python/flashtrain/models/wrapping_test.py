"""Models inside torch's wrappers, and the modes of their modules.

Public reports of the kind: karpathy/nanoGPT#325, Lightning-AI/pytorch-lightning#2551.
"""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from flashtrain.models.generation import generate
from flashtrain.models.gpt import GPT
from flashtrain.models.gpt_reference import random_tokens, tiny
from flashtrain.models.vit import ViT
from flashtrain.models.wrapping import evaluating, unwrap, whole_parameters


def test_every_wrapper_is_taken_off() -> None:
    model = tiny()
    for wrapped in (
        model,
        torch.compile(model),
        DataParallel(model),
        DataParallel(torch.compile(model)),
        torch.compile(DataParallel(model)),
    ):
        assert unwrap(wrapped, GPT) is model
        tokens = generate(wrapped, random_tokens(seq_len=3), 2, temperature=0.0)
        assert torch.equal(tokens, model.generate(random_tokens(seq_len=3), 2, temperature=0.0))
    with pytest.raises(TypeError, match="the model is a GPT; supported: a ViT, also inside"):
        unwrap(torch.compile(model), ViT)


def test_parameters_have_their_names_whichever_module_is_compiled() -> None:
    model = tiny()
    names = list(whole_parameters(model))
    model.blocks[0] = torch.compile(model.blocks[0])
    assert "blocks.0._orig_mod.norm1.weight" in dict(model.named_parameters())
    assert list(whole_parameters(model)) == names


def test_split_parameters_are_refused() -> None:
    model = tiny()
    model.blocks[0].norm1.weight.device_mesh = "as a DTensor has"
    with pytest.raises(ValueError, match=r"blocks.0.norm1.weight is split among ranks"):
        whole_parameters(model)


@pytest.mark.parametrize("fails", [False, True])
def test_each_module_gets_its_own_mode_back(fails: bool) -> None:
    model = tiny(resid_dropout=0.5).train()
    model.blocks[0].eval()  # frozen, without dropout
    before = [module.training for module in model.modules()]
    if fails:
        with torch.no_grad():
            model.norm.weight.fill_(torch.nan)
        with pytest.raises(ValueError, match="logits are NaN"):
            model.generate(random_tokens(seq_len=3), 2)
    else:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
        model.generate(random_tokens(seq_len=3), 2)
    assert [module.training for module in model.modules()] == before
    assert isinstance(model, nn.Module)
