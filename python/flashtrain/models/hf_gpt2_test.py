"""Weights go to transformers' GPT-2 and back; both compute the same.

The shapes of GPT-2's four sizes are tried with narrow heads; on a GPU, as they are.
"""

import errno
import json
import math
import os
import re
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
    """huggingface/transformers#24581."""
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
        ({"n_embd": 10, "n_head": 3}, "n_embd=10 is not a multiple of n_head=3"),
        ({"n_layer": 0}, "n_layer=0 must be at least 1"),
        ({"n_layer": -3}, "n_layer=-3 must be at least 1"),
        ({"n_layer": 10**9}, "n_layer=1000000000 must be at most 10000"),
        ({"vocab_size": None}, "vocab_size=None must be int"),
        ({"vocab_size": "50257"}, "vocab_size='50257' must be int"),
        ({"vocab_size": 50257.0}, "vocab_size=50257.0 must be int"),
        ({"vocab_size": 10**400}, "vocab_size=1000.*must be at most"),
        ({"vocab_size": 10**9, "n_embd": 12000}, "parameters; supported: at most"),
        ({"n_embd": "wide"}, "n_embd='wide' must be int"),
        ({"n_embd": 0, "n_inner": 4}, "n_embd=0 must be at least 1"),
        ({"n_inner": [1]}, r"n_inner=\[1\] must be int, or be null"),
        ({"n_inner": 0}, "n_inner=0 must be at least 1, or be null"),
        ({"activation_function": ["gelu"]}, r"activation_function=\['gelu'\] is not supported"),
        ({"resid_pdrop": math.nan}, "resid_pdrop=nan must"),
        ({"initializer_range": math.inf}, "initializer_range=inf must"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' must be bool"),
    ],
)
def test_other_models_are_refused(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config_from_hf(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"config.json: .*{message}") as refusal:
        from_hf(tmp_path)
    assert len(str(refusal.value)) < 500


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


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a model in several shards."""
    hf_model().save_pretrained(tmp_path / "hf", max_shard_size="2KB")
    return tmp_path / "hf"


def refusal_of(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        from_hf(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_byte_order_mark_is_no_part_of_a_config(saved: Path):
    for name in ("config.json", "model.safetensors.index.json"):
        (saved / name).write_bytes(b"\xef\xbb\xbf" + (saved / name).read_bytes())
    assert from_hf(saved).config.num_heads == 3


def test_hostile_configs_are_refused_by_one_line(saved: Path):
    config = saved / "config.json"
    config.write_text("[" * 100_000)
    assert "config.json cannot be read: its JSON is nested too deep" in refusal_of(saved)
    config.write_text("[]")
    assert "config.json holds list, expected a JSON object" in refusal_of(saved)
    config.write_bytes(b'{"n_layer": \xff}')
    assert "config.json cannot be read: 'utf-8' codec can't decode" in refusal_of(saved)
    config.unlink()
    os.mkfifo(config)
    assert "config.json is a pipe, not a regular file" in refusal_of(saved)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../elsewhere.safetensors"}, "is not the name of a file in"),
        ({"a": "/dev/zero"}, "is not the name of a file in"),
        ({"a": "pipe"}, "pipe is a pipe, not a regular file"),
        ({"a": "zero"}, "zero is a device, not a regular file"),
        ({"a": "folder"}, "folder is a folder, not a regular file"),
        ({"a": "gone"}, "gone does not exist, but model.safetensors.index.json lists it"),
        ({"a": None}, "None does not exist"),
        ({"a": 7 * "x" * 100}, "cannot be read|too long|does not exist"),
        ({}, "has no weight_map"),
        (["a"], "has no weight_map"),
        (None, "has no weight_map"),
    ],
)
def test_indices_stay_in_their_folder(weight_map: Any, message: str, saved: Path):
    os.mkfifo(saved / "pipe")
    (saved / "zero").symlink_to("/dev/zero")
    (saved / "folder").mkdir()
    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert re.search(message, refusal_of(saved))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_are_refused(dtype: torch.dtype):
    hf = hf_model()
    state = hf.state_dict()
    state["transformer.ln_f.weight"] = state["transformer.ln_f.weight"].to(dtype)
    with pytest.raises(ValueError, match=f"transformer.ln_f.weight is {dtype}"):
        load_state_from_hf(ours_of(hf), state)


def test_a_config_that_its_weights_do_not_fit_takes_no_memory(saved: Path):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"n_positions": 2**31 - 1}))
    assert "misshapen: transformer.wpe.weight" in refusal_of(saved)


def test_end_of_text_is_the_tokenizers(tmp_path: Path):
    """salesforce/CodeGen#32, stefan-it/german-gpt2#9."""

    def written(vocab_size: int, name: str, **options: Any) -> Any:
        shape = {"num_layers": 1, "d_model": 4, "num_heads": 1, "max_seq_len": 4, "fused": False}
        model = GPT(config_from_hf({}, **{**shape, "vocab_size": vocab_size}))
        to_hf(model, tmp_path / name, **options)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["bos_token_id"] == config["eos_token_id"]
        return config["eos_token_id"]

    assert written(50257, "a") == written(50304, "b") == 50256
    assert written(256, "c") is written(51_201, "d") is None
    assert written(256, "e", end_of_text=3) == 3
    assert written(50257, "f", end_of_text=None) is None
    with pytest.raises(ValueError, match=r"end_of_text=256 must be None or in 0\.\.255"):
        written(256, "g", end_of_text=256)


def test_wrapped_models_are_exported_as_they_are(tmp_path: Path):
    model = ours_of(hf_model())
    expected = state_to_hf(model)
    wrapped = torch.nn.DataParallel(torch.compile(model))
    for name, tensor in state_to_hf(wrapped).items():
        assert torch.equal(tensor, expected[name])
    load_state_from_hf(wrapped, expected)
    to_hf(wrapped, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("config.json", "model.safetensors")
    ]
    with pytest.raises(TypeError, match="the model is a Linear; supported: a GPT"):
        state_to_hf(nn.Linear(1, 1))


def test_what_could_not_be_written_leaves_nothing(tmp_path: Path, monkeypatch: Any):
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("flashtrain.files.os.fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*/out: the disk is full"):
        to_hf(ours_of(hf_model()), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
