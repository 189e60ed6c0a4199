"""Weights go to transformers' GPT-2 and back; both compute the same.

The shapes of GPT-2's four sizes are tried with narrow heads; on a GPU, as they are.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# Not the network, whatever is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
from transformers import GPT2Config, GPT2LMHeadModel

from flashtrain.errors import UserError
from flashtrain.models.generation import generate
from flashtrain.models.gpt import GPT
from flashtrain.models.hf_gpt2 import (
    config_from_hf,
    config_to_hf,
    from_hf,
    load_state_from_hf,
    state_to_hf,
    to_hf,
)
from flashtrain.testing.devices import DEVICE
from flashtrain.testing.tolerances import max_error

# Layers and heads; the width is 64 a head.
SIZES = {"s": (12, 12), "m": (24, 16), "l": (36, 20), "xl": (48, 25)}
IS_GPU = DEVICE.type == "cuda"
HEAD_DIM, VOCAB, SEQ_LEN = (64, 50257, 256) if IS_GPU else (2, 61, 24)


def hf_model(layers: int = 2, heads: int = 3, seed: int = 0, **options: Any) -> GPT2LMHeadModel:
    """Theirs, with random weights, biases and norms, in evaluation mode."""
    config = GPT2Config(
        vocab_size=VOCAB,
        n_layer=layers,
        n_head=heads,
        n_embd=HEAD_DIM * heads,
        n_positions=SEQ_LEN,
        **{"bos_token_id": VOCAB - 1, "eos_token_id": VOCAB - 1, **options},
    )
    torch.manual_seed(seed)
    with DEVICE:  # billions of random numbers take a CPU long
        model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def ours_of(hf: GPT2LMHeadModel, **overrides: Any) -> GPT:
    with DEVICE:
        model = GPT(config_from_hf(hf.config.to_dict(), **overrides)).eval()
    load_state_from_hf(model, hf.state_dict())
    return model


def tokens_of(batch: int = 2, seq_len: int = SEQ_LEN, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (batch, seq_len), generator=generator).to(DEVICE)


def logits_and_gradients(model: nn.Module, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """fp64 logits and gradients, under their names, of a loss that every logit counts in."""
    if isinstance(model, GPT):
        logits = model(tokens)[..., :VOCAB]
    else:
        logits = model(tokens, use_cache=False).logits
    logits.float().logsumexp(-1).mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    if isinstance(model, GPT):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.grad)
        gradients = state_to_hf(model)
    return logits.detach().double(), {name: g.double() for name, g in gradients.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("size", SIZES)
def test_logits_and_gradients_are_as_exact_as_theirs(size, fused, dtype):
    layers, heads = SIZES[size]
    hf = hf_model(layers, heads, scale_attn_by_inverse_layer_idx=size == "m")
    tokens = tokens_of()
    ours = ours_of(hf, fused=fused).to(dtype)
    exact_dtype = torch.float32 if IS_GPU and dtype != torch.float32 else torch.float64
    exact_logits, exact_gradients = logits_and_gradients(hf.to(exact_dtype), tokens)
    hf.zero_grad(set_to_none=True)
    their_logits, their_gradients = logits_and_gradients(hf.to(dtype), tokens)
    our_logits, our_gradients = logits_and_gradients(ours, tokens)
    # The largest errors of two paths differ by chance: a unit in the last place of bf16 is allowed.
    floor = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    bound = 3 * max_error(their_logits, exact_logits) + floor * exact_logits.abs().max()
    assert max_error(our_logits, exact_logits) <= bound
    assert our_gradients.keys() == exact_gradients.keys()
    for name, exact in exact_gradients.items():
        bound = 3 * max_error(their_gradients[name], exact) + floor * exact.abs().max()
        assert max_error(our_gradients[name], exact) <= bound, name


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_round_trip_is_exact(tie):
    hf = hf_model(tie_word_embeddings=tie)
    ours = ours_of(hf)
    assert ours.config.padded_vocab_size > VOCAB
    for table in {ours.embedding.tokens.weight, ours.head.weight}:
        assert (table[VOCAB:] == 0).all()
    back = state_to_hf(ours)
    theirs = hf.state_dict()
    if tie:
        del theirs["lm_head.weight"]
    assert back.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(back[name], tensor), name
    again = GPT(ours.config).to(DEVICE)
    load_state_from_hf(again, back)
    for (name, before), after in zip(ours.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(before, after), name


def test_folders_are_exchanged_both_ways(tmp_path):
    hf = hf_model(n_inner=7, activation_function="relu", layer_norm_epsilon=1e-3)
    hf.save_pretrained(tmp_path / "theirs", max_shard_size="2KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    ours = from_hf(tmp_path / "theirs", fused=False).to(DEVICE).eval()
    tokens = tokens_of()
    expected = hf(tokens).logits
    torch.testing.assert_close(ours(tokens)[..., :VOCAB], expected, rtol=1e-5, atol=1e-5)
    to_hf(ours, tmp_path / "ours")
    back, report = GPT2LMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert back.config.n_inner == 7
    for (name, tensor), other in zip(
        hf.state_dict().items(), back.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor.cpu(), other), name
    with pytest.raises(UserError, match="exists and is not overwritten"):
        to_hf(ours, tmp_path / "ours")


def test_names_without_the_prefix_and_old_masks_are_taken():
    hf = hf_model()
    ours = ours_of(hf)
    state = hf.transformer.state_dict()
    state["h.0.attn.bias"] = torch.ones(1, 1, 4, 4).tril().bool()
    state["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    other = GPT(ours.config).to(DEVICE)
    load_state_from_hf(other, state)
    for expected, found in zip(ours.parameters(), other.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_configs_go_both_ways():
    for options in (
        {},
        {"n_inner": 9, "activation_function": "gelu", "attn_pdrop": 0.3},
        {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False},
    ):
        ours = config_from_hf(GPT2Config(**options).to_dict())
        again = config_from_hf(GPT2Config(**config_to_hf(ours)).to_dict())
        assert again == ours


def test_greedy_decoding_gives_their_tokens():
    hf = hf_model(layers=3, heads=4)
    ours = ours_of(hf)
    prompt, new = tokens_of(batch=3, seq_len=5), 16
    options = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0, "eos_token_id": None}
    theirs = hf.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert torch.equal(generate(ours, prompt, new, temperature=0.0), theirs)
    # Of unequal length: theirs are filled on the left, too.
    lengths = [2, 5, 3]
    mask = torch.stack([torch.arange(5) >= 5 - n for n in lengths]).long().to(DEVICE)
    theirs = hf.generate(prompt * mask, attention_mask=mask, **options)
    prompts = [row[5 - n :] for row, n in zip(prompt, lengths, strict=True)]
    assert torch.equal(generate(ours, prompts, new, temperature=0.0), theirs)


def test_what_does_not_fit_is_named():
    hf = hf_model()
    ours = ours_of(hf)
    state = hf.state_dict()
    before = [p.clone() for p in ours.parameters()]
    del state["transformer.h.1.mlp.c_fc.bias"]
    state["transformer.h.2.ln_1.weight"] = torch.zeros(6)
    state["transformer.wpe.weight"] = torch.zeros(3, HEAD_DIM * 3)
    with pytest.raises(ValueError, match="does not fit the model") as refusal:
        load_state_from_hf(ours, state, source="file")
    message = str(refusal.value)
    assert "missing: transformer.h.1.mlp.c_fc.bias;" in message
    assert "unexpected: transformer.h.2.ln_1.weight;" in message
    assert f"misshapen: transformer.wpe.weight is [3, {HEAD_DIM * 3}] instead of" in message
    assert all(torch.equal(a, b) for a, b in zip(before, ours.parameters(), strict=True))
    state = hf.state_dict()
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(ValueError, match="supported with tie_embeddings=False"):
        load_state_from_hf(ours, state)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "opt"}, "model_type is 'opt'; supported: 'gpt2'"),
        ({"activation_function": "silu"}, "activation_function='silu' is not supported; "),
        ({"scale_attn_weights": False}, "scale_attn_weights=False is not supported"),
        ({"n_embd": 10, "n_head": 3}, "d_model=10 is not a multiple"),
    ],
)
def test_other_models_are_refused(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config_from_hf(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"config.json: .*{message}"):
        from_hf(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rotary_fraction": 0.5}, "model.rotary_dim=2 has no form"),
        ({"block": "parallel"}, "model.block='parallel' has no form"),
        ({"num_kv_heads": 1}, "model.num_kv_heads=1 has no form"),
        ({"activation": "swiglu"}, "model.activation='swiglu' has no form"),
    ],
)
def test_options_that_their_gpt2_lacks_are_refused(overrides, message):
    options = {"num_layers": 1, "d_model": 8, "num_heads": 2, "max_seq_len": 8, "fused": False}
    ours = GPT(config_from_hf({}, **{**options, "vocab_size": 11, **overrides}))
    with pytest.raises(ValueError, match=message):
        state_to_hf(ours)


def test_unusable_folders_are_refused_by_one_line(tmp_path: Path):
    def refusal() -> str:
        with pytest.raises(UserError) as caught:
            from_hf(tmp_path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "config.json does not exist" in refusal()
    hf = hf_model()
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read" in refusal()
    hf.config.save_pretrained(tmp_path)
    assert "model.safetensors does not exist" in refusal()
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"\x10\0\0\0\0\0\0\0 no header")
    assert "no whole safetensors file" in refusal()
    hf.save_pretrained(tmp_path)
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-7])
    assert "no whole safetensors file" in refusal()
    weights.write_bytes(whole)
    tensors = load_file(weights)
    del tensors["transformer.ln_f.bias"]
    save_file(tensors, weights)
    assert f"{tmp_path} does not fit the model; missing: transformer.ln_f.bias" in refusal()
