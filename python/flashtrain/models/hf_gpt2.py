"""GPT-2 in Hugging Face's form: configs, state dicts and folders, both ways and bit for bit.

Their GPT-2 stores the weights of its projections transposed ([in, out], Conv1D), has no padding
rows in its tables, and leaves the head out of files where it is tied.

    model = from_hf("gpt2/")          # a folder with config.json and model.safetensors
    to_hf(model, "mine/")             # transformers' GPT2LMHeadModel.from_pretrained("mine/")
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flashtrain.errors import UserError, did_you_mean
from flashtrain.models.gpt import GPT
from flashtrain.models.gpt_config import GPTConfig
from flashtrain.models.weights import (
    check_names_and_shapes,
    copy_into,
    read_json,
    read_safetensors,
)

_CONFIG = "config.json"
_PREFIX = "transformer."

_ACTIVATIONS = {
    "gelu_new": "gelu_approx",
    "gelu_fast": "gelu_approx",
    "gelu_pytorch_tanh": "gelu_approx",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "sqrelu",
}
# Theirs for ours; of several that mean the same, the first.
_HF_ACTIVATIONS = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}

# Module of a block: (theirs, ours, whether the weight is transposed).
_BLOCK_MODULES = (
    ("ln_1", "norm1", False),
    ("attn.c_attn", "attention.qkv", True),
    ("attn.c_proj", "attention.out", True),
    ("ln_2", "norm2", False),
    ("mlp.c_fc", "mlp.fc1", True),
    ("mlp.c_proj", "mlp.fc2", True),
)
# Causal masks that old files hold as buffers.
_IGNORED_SUFFIXES = (".attn.bias", ".attn.masked_bias")


def config_from_hf(config: Mapping[str, Any], **overrides: Any) -> GPTConfig:
    """Our config for a `GPT2Config.to_dict()`.

    Args:
        config: theirs; keys left out have their defaults.
        overrides: keys of GPTConfig, such as pad_vocab_size_multiple.

    Raises:
        ValueError: the model is another one, or has an option that GPT has not.
    """
    if config.get("model_type", "gpt2") != "gpt2":
        raise ValueError(f"model_type is {config['model_type']!r}; supported: 'gpt2'")
    activation = config.get("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"activation_function={activation!r} is not supported; "
            + did_you_mean(activation, _ACTIVATIONS)
        )
    for key, value in (("scale_attn_weights", True), ("add_cross_attention", False)):
        if config.get(key, value) != value:
            raise ValueError(f"{key}={config[key]} is not supported; supported: {value}")
    width = config.get("n_embd", 768)
    options: dict[str, Any] = {
        "vocab_size": config.get("vocab_size", 50257),
        "num_layers": config.get("n_layer", 12),
        "d_model": width,
        "num_heads": config.get("n_head", 12),
        "max_seq_len": config.get("n_positions", 1024),
        "mlp_ratio": (config.get("n_inner") or 4 * width) / width,
        "activation": _ACTIVATIONS[activation],
        "resid_dropout": config.get("resid_pdrop", 0.1),
        "embd_dropout": config.get("embd_pdrop", 0.1),
        "attn_dropout": config.get("attn_pdrop", 0.1),
        "layer_norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "scale_attn_by_inverse_layer_idx": config.get("scale_attn_by_inverse_layer_idx", False),
        "tie_embeddings": config.get("tie_word_embeddings", True),
        "init_std": config.get("initializer_range", 0.02),
    }
    return GPTConfig(**{**options, **overrides})


# What their GPT-2 has not: its value for every model that it can express.
_FIXED: dict[str, Any] = {
    "block": "pre_norm",
    "norm": "layer_norm",
    "learned_positions": True,
    "rotary_dim": 0,
    "alibi": False,
    "window": 0,
}


def config_to_hf(config: GPTConfig) -> dict[str, Any]:
    """Theirs for ours, the content of config.json.

    Raises:
        ValueError: their GPT-2 has no form for an option.
    """
    if config.num_kv_heads not in (0, config.num_heads):
        raise ValueError(
            f"model.num_kv_heads={config.num_kv_heads} has no form in Hugging Face's GPT-2; "
            "supported: 0"
        )
    for key, value in _FIXED.items():
        if getattr(config, key) != value:
            raise ValueError(
                f"model.{key}={getattr(config, key)!r} has no form in Hugging Face's GPT-2; "
                f"supported: {value!r}"
            )
    if config.activation not in _HF_ACTIVATIONS:
        raise ValueError(
            f"model.activation={config.activation!r} has no form in Hugging Face's GPT-2; "
            f"supported: {', '.join(_HF_ACTIVATIONS)}"
        )
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "n_embd": config.d_model,
        "n_head": config.num_heads,
        "n_positions": config.max_seq_len,
        "n_inner": None if config.d_ff == 4 * config.d_model else config.d_ff,
        "activation_function": _HF_ACTIVATIONS[config.activation],
        "resid_pdrop": config.resid_dropout,
        "embd_pdrop": config.embd_dropout,
        "attn_pdrop": config.attn_dropout,
        "layer_norm_epsilon": config.layer_norm_eps,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        # The end-of-text token is the last one of GPT-2's vocabulary.
        "bos_token_id": config.vocab_size - 1,
        "eos_token_id": config.vocab_size - 1,
    }


def _names(num_layers: int) -> list[tuple[str, str, bool]]:
    """(their parameter, our module's parameter, transposed), the tables and the head apart."""
    modules = [("ln_f", "norm", False)]
    for i in range(num_layers):
        modules += [(f"h.{i}.{a}", f"blocks.{i}.{b}", flip) for a, b, flip in _BLOCK_MODULES]
    return [
        (f"{_PREFIX}{theirs}.{kind}", f"{ours}.{kind}", flip and kind == "weight")
        for theirs, ours, flip in modules
        for kind in ("weight", "bias")
    ] + [(f"{_PREFIX}wpe.weight", "embedding.positions.weight", False)]


def _tables(config: GPTConfig) -> list[tuple[str, str]]:
    """(theirs, ours) of the parameters with a row for each token."""
    tables = [(f"{_PREFIX}wte.weight", "embedding.tokens.weight")]
    return tables if config.tie_embeddings else [*tables, ("lm_head.weight", "head.weight")]


def state_to_hf(model: GPT) -> dict[str, Tensor]:
    """The state dict of transformers' GPT2LMHeadModel with the same weights, copied.

    Raises:
        ValueError: see `config_to_hf`.
    """
    config_to_hf(model.config)
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    state = {
        theirs: (own[ours].T if transposed else own[ours]).clone(
            memory_format=torch.contiguous_format
        )
        for theirs, ours, transposed in _names(model.config.num_layers)
    }
    for theirs, ours in _tables(model.config):
        state[theirs] = own[ours][: model.config.vocab_size].clone()
    return state


def load_state_from_hf(model: GPT, state: Mapping[str, Tensor], source: str = "state") -> None:
    """Copies a state dict of transformers' GPT2LMHeadModel or GPT2Model into a model.

    Args:
        model: of the same shape; its padding rows become zero.
        state: names with or without "transformer.".
        source: what error messages call it.

    Raises:
        ValueError: names what is missing, unexpected or misshapen; nothing has been copied then.
    """
    config_to_hf(model.config)
    found = {
        name if name.startswith((_PREFIX, "lm_head.")) else _PREFIX + name: tensor
        for name, tensor in state.items()
        if not name.endswith(_IGNORED_SUFFIXES)
    }
    config = model.config
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    expected = {
        theirs: own[ours].T.shape if transposed else own[ours].shape
        for theirs, ours, transposed in _names(config.num_layers)
    }
    for theirs, _ in _tables(config):
        expected[theirs] = torch.Size((config.vocab_size, config.d_model))
    head, tokens = found.get("lm_head.weight"), found.get(f"{_PREFIX}wte.weight")
    if config.tie_embeddings and head is not None:
        if tokens is not None and not torch.equal(head, tokens):
            raise ValueError(
                f"{source} has a head of its own, lm_head.weight differs from wte.weight; "
                "supported with tie_embeddings=False"
            )
        del found["lm_head.weight"]
    check_names_and_shapes(source, found, expected)
    tensors = {
        ours: found[theirs].T if transposed else found[theirs]
        for theirs, ours, transposed in _names(config.num_layers)
    }
    for theirs, ours in _tables(config):
        padding = config.padded_vocab_size - config.vocab_size
        tensors[ours] = torch.nn.functional.pad(found[theirs], (0, 0, 0, padding))
    copy_into(model, tensors)


def from_hf(folder: str | os.PathLike[str], **overrides: Any) -> GPT:
    """A model from a folder with config.json and model.safetensors (or its shards).

    Args:
        folder: as transformers' save_pretrained writes it.
        overrides: keys of GPTConfig.

    Returns:
        An fp32 model on the CPU, in training mode.

    Raises:
        UserError: a file is missing, damaged or of another model.
    """
    folder = Path(folder)
    config_file = folder / _CONFIG
    if not config_file.is_file():
        raise UserError(f"{config_file} does not exist; {folder} is no folder of a GPT-2 model")
    try:
        config = config_from_hf(read_json(config_file), **overrides)
    except (TypeError, ValueError) as error:
        raise UserError(f"{config_file}: {error}") from error
    state = read_safetensors(folder)
    model = GPT(config)
    try:
        load_state_from_hf(model, state, source=str(folder))
    except ValueError as error:
        raise UserError(str(error)) from error
    return model


def to_hf(model: GPT, folder: str | os.PathLike[str]) -> None:
    """Writes config.json and model.safetensors, which transformers' from_pretrained reads.

    Raises:
        ValueError: see `config_to_hf`.
        UserError: the folder holds a model already, or cannot be written.
    """
    folder = Path(folder)
    weights_file, config_file = folder / "model.safetensors", folder / _CONFIG
    for file in (weights_file, config_file):
        if file.exists():
            raise UserError(f"{file} exists and is not overwritten; choose another folder")
    config, state = config_to_hf(model.config), state_to_hf(model)
    config["dtype"] = str(state[f"{_PREFIX}wte.weight"].dtype).removeprefix("torch.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.cpu() for name, tensor in state.items()}
        save_file(tensors, weights_file, metadata={"format": "pt"})
        config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from error
