"""GPT-2 in Hugging Face's form: configs, state dicts and folders, both ways and bit for bit.

Their GPT-2 stores the weights of its projections transposed ([in, out], Conv1D), has no padding
rows in its tables, and leaves the head out of files where it is tied.

    model = from_hf("gpt2/")          # a folder with config.json and model.safetensors
    to_hf(model, "mine/")             # transformers' GPT2LMHeadModel.from_pretrained("mine/")
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from flashtrain import files
from flashtrain.errors import UserError, did_you_mean
from flashtrain.errors.ranges import COUNT, problem, shown
from flashtrain.models.gpt import GPT
from flashtrain.models.gpt_config import GPTConfig
from flashtrain.models.weights import (
    check_names_and_shapes,
    copy_into,
    read_json,
    read_safetensors,
)
from flashtrain.models.wrapping import unwrap, whole_parameters

_CONFIG = "config.json"
_PREFIX = "transformer."

_GPT2_END_OF_TEXT = 50256
_GPT2_LARGEST_VOCAB_SIZE = 51_200  # 50,257 padded to a multiple of 1,024

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

# Keys that mean the same: theirs and its default.
_KEYS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 50257),
    "num_layers": ("n_layer", 12),
    "d_model": ("n_embd", 768),
    "num_heads": ("n_head", 12),
    "max_seq_len": ("n_positions", 1024),
    "resid_dropout": ("resid_pdrop", 0.1),
    "embd_dropout": ("embd_pdrop", 0.1),
    "attn_dropout": ("attn_pdrop", 0.1),
    "layer_norm_eps": ("layer_norm_epsilon", 1e-5),
    "scale_attn_by_inverse_layer_idx": ("scale_attn_by_inverse_layer_idx", False),
    "tie_embeddings": ("tie_word_embeddings", True),
    "init_std": ("initializer_range", 0.02),
}

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
        raise ValueError(f"model_type is {shown(config['model_type'])}; supported: 'gpt2'")
    activation = config.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise ValueError(
            f"activation_function={shown(activation)} is not supported; "
            + did_you_mean(str(activation), _ACTIVATIONS)
        )
    for key, value in (("scale_attn_weights", True), ("add_cross_attention", False)):
        if config.get(key, value) != value:
            raise ValueError(f"{key}={shown(config[key])} is not supported; supported: {value}")
    options = {ours: config.get(theirs, default) for ours, (theirs, default) in _KEYS.items()}
    options["activation"] = _ACTIVATIONS[activation]
    width, inner = options["d_model"], config.get("n_inner")
    if inner is not None:
        if wrong := problem(inner, int, COUNT):
            raise ValueError(f"n_inner={shown(inner)} must {wrong}, or be null")
        if not problem(width, int, COUNT):
            options["mlp_ratio"] = inner / width
    try:
        return GPTConfig(**{**options, **overrides})
    except (TypeError, ValueError) as error:  # in the words of their config
        message = str(error)
        for ours, (theirs, _) in _KEYS.items():
            if ours not in overrides:
                message = re.sub(rf"model\.{ours}\b", theirs, message)
        raise type(error)(message) from None


# What their GPT-2 has not: its value for every model that it can express.
_FIXED: dict[str, Any] = {
    "block": "pre_norm",
    "norm": "layer_norm",
    "learned_positions": True,
    "rotary_dim": 0,
    "alibi": False,
    "window": 0,
}


def config_to_hf(config: GPTConfig, end_of_text: int | None = None) -> dict[str, Any]:
    """Theirs for ours, the content of config.json.

    Args:
        end_of_text: the token that ends a text, which is the tokenizer's to say; None for none.

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
        **{theirs: getattr(config, ours) for ours, (theirs, _) in _KEYS.items()},
        "n_inner": None if config.d_ff == 4 * config.d_model else config.d_ff,
        "activation_function": _HF_ACTIVATIONS[config.activation],
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
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


def state_to_hf(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of transformers' GPT2LMHeadModel with the same weights, copied.

    Args:
        model: a GPT, also compiled or inside DistributedDataParallel.

    Raises:
        ValueError: see `config_to_hf`; or the weights are split among ranks.
    """
    gpt = unwrap(model, GPT)
    config = gpt.config
    config_to_hf(config)
    own = {name: parameter.detach() for name, parameter in whole_parameters(gpt).items()}
    state = {
        theirs: (own[ours].T if transposed else own[ours]).clone(
            memory_format=torch.contiguous_format
        )
        for theirs, ours, transposed in _names(config.num_layers)
    }
    for theirs, ours in _tables(config):
        state[theirs] = own[ours][: config.vocab_size].clone()
    return state


def load_state_from_hf(
    model: nn.Module, state: Mapping[str, Tensor], source: str = "state"
) -> None:
    """Copies a state dict of transformers' GPT2LMHeadModel or GPT2Model into a model.

    Args:
        model: a GPT of the same shape, also compiled or inside DistributedDataParallel; its padding
            rows become zero.
        state: names with or without "transformer.".
        source: what error messages call it.

    Raises:
        ValueError: names what is missing, unexpected or misshapen; nothing has been copied then.
    """
    gpt = unwrap(model, GPT)
    parameters = whole_parameters(gpt)
    tensors = _tensors_from_hf(gpt, parameters, state, source)
    copy_into(parameters, tensors)


def _tensors_from_hf(
    model: GPT, own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Theirs by the names of our parameters `own`, whose shapes alone are looked at."""
    config = model.config
    config_to_hf(config)
    found = {
        name if name.startswith((_PREFIX, "lm_head.")) else _PREFIX + name: tensor
        for name, tensor in state.items()
        if not name.endswith(_IGNORED_SUFFIXES)
    }
    expected = {
        theirs: own[ours].shape[::-1] if transposed else own[ours].shape
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
    return tensors


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
    if not config_file.exists():
        raise UserError(f"{config_file} does not exist; {folder} is no folder of a GPT-2 model")
    try:
        config = config_from_hf(read_json(config_file), **overrides)
    except (TypeError, ValueError) as error:
        raise UserError(f"{config_file}: {error}") from error
    state = read_safetensors(folder)
    try:
        # Compared before memory is spent: a config may claim any size.
        with torch.device("meta"):
            model = GPT(config)
        tensors = _tensors_from_hf(model, whole_parameters(model), state, source=str(folder))
    except ValueError as error:
        raise UserError(str(error)) from error
    model.to_empty(device="cpu")
    copy_into(whole_parameters(model), tensors)
    return model


def to_hf(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    end_of_text: int | str | None = "gpt2",
) -> None:
    """Writes config.json and model.safetensors, which transformers' from_pretrained reads.

    Args:
        model: a GPT, also compiled or inside DistributedDataParallel.
        folder: is made where it is not there.
        end_of_text: the token that ends a text, `tokenizer.end_of_text`, at which transformers
            stops; None for none. By default GPT-2's where the model has room for its vocabulary,
            padded to at most 51,200, and else none.

    Raises:
        ValueError: see `state_to_hf`; or the end of text is no token of the model.
        UserError: the folder holds a model already, or cannot be written.
    """
    gpt, folder = unwrap(model, GPT), Path(folder)
    vocab_size = gpt.config.vocab_size
    if end_of_text == "gpt2":
        is_gpt2s = _GPT2_END_OF_TEXT < vocab_size <= _GPT2_LARGEST_VOCAB_SIZE
        end_of_text = _GPT2_END_OF_TEXT if is_gpt2s else None
    if not (end_of_text is None or (type(end_of_text) is int and 0 <= end_of_text < vocab_size)):
        raise ValueError(f"end_of_text={shown(end_of_text)} must be None or in 0..{vocab_size - 1}")
    weights_file, config_file = folder / "model.safetensors", folder / _CONFIG
    for file in (weights_file, config_file):
        if file.exists():
            raise UserError(f"{file} exists and is not overwritten; choose another folder")
    config, state = config_to_hf(gpt.config, end_of_text), state_to_hf(gpt)
    config["dtype"] = str(state[f"{_PREFIX}wte.weight"].dtype).removeprefix("torch.")
    tensors = {name: tensor.cpu() for name, tensor in state.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The config last, whole or not at all: with it the folder is a model.
        _write_weights(weights_file, tensors)
        files.write(config_file, f"{json.dumps(config, indent=2)}\n".encode())
    except OSError as error:
        raise UserError(f"cannot write {folder}: {files.cause(error)}") from error
    except SafetensorError as error:
        raise UserError(f"cannot write {folder}: {error}") from error


def _write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """All of the file or nothing."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        save_file(dict(tensors), temporary, metadata={"format": "pt"})
        with open(temporary, "rb") as file:
            files.flush(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
