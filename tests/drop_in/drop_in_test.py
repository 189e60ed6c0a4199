"""docs/flash_attn_drop_in.md: what it maps is there, with flash-attn's arguments.

flash_attn_signatures.json holds those of the version it names, as they stand in its source.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "flash_attn_drop_in.md").read_text(encoding="utf-8")
RECORD = json.loads((ROOT / "tests" / "drop_in" / "flash_attn_signatures.json").read_bytes())
ROW = re.compile(r"^\| `(flash_attn\.[\w.]+)` \| `(flashtrain\.[\w.]+)` \|(.*)\|$", re.MULTILINE)
ROWS = ROW.findall(PAGE)

REQUIRED = object()


def recorded_parameters(name: str) -> dict[str, object]:
    """Their defaults by name, in order."""
    function = ast.parse(f"lambda {RECORD['signatures'][name]}: None", mode="eval").body
    assert isinstance(function, ast.Lambda)
    arguments = function.args
    names = [argument.arg for argument in arguments.args]
    defaults = [ast.literal_eval(default) for default in arguments.defaults]
    return dict(zip(names, [REQUIRED] * (len(names) - len(defaults)) + defaults))


def find(path: str) -> Callable:
    module, *names = path.split(".")
    found: Any = importlib.import_module(module)
    for i, name in enumerate(names):
        if inspect.ismodule(found) and not hasattr(found, name):
            found = importlib.import_module(".".join([module, *names[: i + 1]]))
        else:
            found = getattr(found, name)
    return found


def parameters(function: Callable, kinds: tuple) -> dict[str, object]:
    signature = inspect.signature(function)
    return {
        name: REQUIRED if p.default is inspect.Parameter.empty else p.default
        for name, p in signature.parameters.items()
        if p.kind in kinds and name != "self"
    }


def compare(theirs: dict[str, object], function: Callable, omitted: list[str]) -> None:
    unknown = set(omitted) - set(theirs)
    assert not unknown, f"{unknown} are no arguments of flash-attn's"
    expected = {name: default for name, default in theirs.items() if name not in omitted}
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    assert list(parameters(function, kinds).items()) == list(expected.items())
    extra = parameters(function, (inspect.Parameter.KEYWORD_ONLY,))
    assert REQUIRED not in extra.values(), "a keyword that flash-attn's callers do not give"
    assert not set(extra) & set(omitted)
    every = {p.kind for p in inspect.signature(function).parameters.values()}
    assert not every & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


@pytest.mark.parametrize(("theirs", "ours", "omitted"), ROWS, ids=[row[0] for row in ROWS])
def test_arguments_are_those_of_flash_attn(theirs: str, ours: str, omitted: str) -> None:
    """Under our path, and under flash-attn's with the prefix."""
    function = find(ours)
    compare(recorded_parameters(theirs), function, re.findall(r"`(\w+)`", omitted))
    assert find(f"flashtrain.compat.{theirs}") is function


# A program as it was written for flash-attn.
PROGRAM = """
import torch
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_varlen_kvpacked_func
from flash_attn import flash_attn_varlen_qkvpacked_func
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from flash_attn.flash_attn_interface import flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb, apply_rotary_emb_func
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops.fused_dense import FusedDense, FusedMLP, fused_mlp_func
from flash_attn.ops.layer_norm import DropoutAddLayerNorm, dropout_add_layer_norm
from flash_attn.ops.rms_norm import RMSNorm, rms_norm
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn.ops.triton.layer_norm import layer_norm_fn, layer_norm_linear_fn, rms_norm_fn
import flash_attn.ops.triton.layer_norm

torch.manual_seed(0)
norm, out_norm, head = DropoutAddLayerNorm(32, prenorm=True), RMSNorm(32), FusedDense(32, 50)
qkv_layer, mlp, rotary = FusedDense(32, 96), FusedMLP(32), RotaryEmbedding(8)
x = torch.randn(2, 6, 32, requires_grad=True)
mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
z, residual = norm(x, None)
qkv = rotary(qkv_layer(z).view(2, 6, 3, 4, 8))
rows, indices, cu_seqlens, max_seqlen, _ = unpad_input(qkv, mask)
y = flash_attn_varlen_qkvpacked_func(rows, cu_seqlens, max_seqlen, causal=True)
same = flash_attn_varlen_kvpacked_func(
    rows[:, 0], rows[:, 1:], cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True
)
assert torch.equal(y, same)
z, residual = norm(pad_input(y, indices, 2, 6).flatten(2), residual)
z, residual = norm(mlp(z), residual)
logits = head(out_norm(residual))
labels = torch.randint(0, 50, (2, 6)).masked_fill(mask == 0, -100)
loss = CrossEntropyLoss()(logits.flatten(0, 1), labels.flatten())
loss.backward()
assert x.grad is not None and x.grad[mask.bool()].abs().min() > 0
layers = (norm, out_norm, head, qkv_layer, mlp)
assert all(p.grad is not None and p.grad.any() for layer in layers for p in layer.parameters())
"""


def test_a_program_moves_by_a_prefix() -> None:
    exec(re.sub(r"\bflash_attn(?=[. ])", "flashtrain.compat.flash_attn", PROGRAM), {})


def test_the_page_names_the_version_of_the_record() -> None:
    assert f"flash-attn {RECORD['version']}" in PAGE


def test_every_recorded_name_is_on_the_page() -> None:
    """As a row, or by its last name in the text below one."""
    for name in RECORD["signatures"]:
        last = name.removesuffix(".forward").split(".")[-1]
        assert f"`{name}`" in PAGE or re.search(rf"`[\w.]*\b{last}\b", PAGE), name


def test_every_table_line_is_checked() -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith("| `flash_attn.")]
    assert len(lines) == len(ROWS) > 20


@pytest.mark.parametrize(
    ("function", "omitted", "fits"),
    [
        (lambda x, w, eps=1e-5: 0, [], True),
        (lambda x, w, eps=1e-5, *, more=None: 0, [], True),
        (lambda x, w: 0, ["eps"], True),
        (lambda x, w, eps=1e-6: 0, [], False),
        (lambda w, x, eps=1e-5: 0, [], False),
        (lambda x, weight, eps=1e-5: 0, [], False),
        (lambda x, w, eps=1e-5, more=None: 0, [], False),
        (lambda x, w, *, eps=1e-5: 0, [], False),
        (lambda x, w, eps=1e-5, *, more: 0, [], False),
        (lambda x, w, eps=1e-5, **more: 0, [], False),
        (lambda x, w, eps=1e-5: 0, ["bias"], False),
    ],
)
def test_the_comparison_itself(function: Callable, omitted: list[str], fits: bool) -> None:
    theirs = {"x": REQUIRED, "w": REQUIRED, "eps": 1e-5}
    if fits:
        compare(theirs, function, omitted)
    else:
        with pytest.raises(AssertionError):
            compare(theirs, function, omitted)
