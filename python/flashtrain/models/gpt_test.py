"""GPT against an independent implementation in fp64, and the promises of its docstrings."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashtrain.models.gpt import GPT, GPTConfig
from flashtrain.models.gpt_reference import (
    OPTIONS,
    TINY,
    random_tokens,
    reference_logits,
    tiny,
    tiny_config,
)
from flashtrain.testing.tolerances import max_error


@pytest.mark.parametrize("overrides", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("seq_len", [1, 5, 12])
def test_logits_equal_the_reference(overrides, seq_len):
    model = tiny(**overrides)
    tokens = random_tokens(seq_len=seq_len)
    expected = reference_logits(model, tokens)
    logits = model(tokens)
    assert logits.shape == (2, seq_len, model.config.padded_vocab_size)
    torch.testing.assert_close(
        logits[..., : TINY["vocab_size"]].double(), expected, rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("overrides", OPTIONS.values(), ids=OPTIONS)
def test_gradients_equal_the_reference(overrides):
    model = tiny(**overrides).double()
    tokens, targets = random_tokens(seed=1), random_tokens(seed=2)
    model(tokens, targets).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    F.cross_entropy(reference_logits(model, tokens).flatten(0, 1), targets.flatten()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_gradients_equal_finite_differences():
    model = tiny(num_layers=1, d_model=8, num_heads=2).double()
    tokens, targets = random_tokens(seq_len=5, seed=1), random_tokens(seq_len=5, seed=2)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def loss(*values):
        overridden = dict(zip(names, values, strict=True))
        return torch.func.functional_call(model, overridden, (tokens, targets))

    assert torch.autograd.gradcheck(loss, parameters, fast_mode=True)


@pytest.mark.parametrize(
    "overrides",
    [{}, {"rotary_fraction": 1.0}, {"alibi": True, "window": 3}, {"block": "parallel"}],
    ids=lambda overrides: ",".join(overrides) or "default",
)
def test_documents_do_not_see_each_other(overrides):
    model = tiny(**overrides)
    tokens = random_tokens()
    documents = torch.tensor([[0, 5, 6, 12], [0, 12, 12, 12]], dtype=torch.int32)
    positions = torch.tensor([[*range(5), 0, *range(6)], [*range(12)]])
    starts = [[0, 5, 6], [0]]
    for places in (None, positions):
        logits = model(tokens, documents_BC=documents, positions_BT=places)[..., :37].double()
        expected = reference_logits(model, tokens, starts, places)
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    # With positions from 0 a document's logits are those it has alone.
    alone = model(tokens[:1, 6:])[..., :37].double()
    torch.testing.assert_close(logits[:1, 6:], alone, rtol=0, atol=2e-5)


def test_targets_that_do_not_count():
    model = tiny()
    tokens, targets = random_tokens(seed=1), random_tokens(seed=2)
    targets[0, 3:] = -100
    logits = model(tokens)[..., :37]
    kept = targets != -100
    torch.testing.assert_close(model(tokens, targets), F.cross_entropy(logits[kept], targets[kept]))
    nothing = model(tokens, torch.full_like(targets, -100))
    assert nothing.item() == 0.0
    nothing.backward()
    assert all((p.grad == 0).all() for p in model.parameters())


def test_checkpointing_repeats_the_dropout():
    options: Any = {"resid_dropout": 0.3, "attn_dropout": 0.3, "embd_dropout": 0.3}
    gradients = []
    for recompute in (False, True):
        model = tiny(activation_checkpointing=recompute, **options)
        torch.manual_seed(1)
        model(random_tokens(seed=1), random_tokens(seed=2)).backward()
        gradients.append([p.grad for p in model.parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, kept, rtol=0, atol=0)


@pytest.mark.parametrize("multiple", [1, 8, 128])
def test_loss_is_cross_entropy_over_the_unpadded_vocabulary(multiple):
    model = tiny(pad_vocab_size_multiple=multiple)
    tokens, targets = random_tokens(seed=1), random_tokens(seed=2)
    loss = model(tokens, targets)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    logits = model(tokens)[..., : TINY["vocab_size"]]
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    torch.testing.assert_close(model.loss(tokens, targets), loss)


def test_padding_neither_counts_nor_learns():
    model = tiny(pad_vocab_size_multiple=64)
    assert model.config.padded_vocab_size == 64
    assert (model(random_tokens())[..., 37:] == -math.inf).all()
    model(random_tokens(seed=1), random_tokens(seed=2)).backward()
    gradient = model.embedding.tokens.weight.grad
    assert (gradient[37:] == 0).all()
    assert (gradient[:37] != 0).any(dim=1).all()


def test_future_tokens_do_not_matter():
    model = tiny()
    tokens = random_tokens()
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % TINY["vocab_size"]
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=0)
    assert (before[:, 7:, :37] != after[:, 7:, :37]).any(dim=-1).all()


def test_head_is_tied_unless_told_otherwise():
    tied, untied = tiny(), tiny(tie_embeddings=False)
    assert tied.head.weight is tied.embedding.tokens.weight
    assert untied.head.weight is not untied.embedding.tokens.weight
    assert untied.num_parameters() == tied.num_parameters() + 37 * 24


def test_initialisation():
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=1000, num_layers=8, d_model=128, num_heads=4, max_seq_len=256, fused=False
    )
    model = GPT(config)
    residual_std = 0.02 / math.sqrt(2 * 8)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            into_residual = name.endswith(("attention.out.weight", "mlp.fc2.weight"))
            std = residual_std if into_residual else 0.02
            values = parameter[:1000]
            # The standard error of a standard deviation is std / sqrt(2 n); 5 of them.
            tolerance = 5 * std / math.sqrt(2 * values.numel())
            assert abs(values.std().item() - std) < tolerance, name
            assert abs(values.mean().item()) < 5 * std / math.sqrt(values.numel()), name
    assert (model.embedding.tokens.weight[1000:] == 0).all()


def test_a_new_model_predicts_the_uniform_distribution():
    torch.manual_seed(0)
    model = GPT(tiny_config(vocab_size=300))
    loss = model(random_tokens(seed=1), random_tokens(seed=2))
    assert abs(loss.item() - math.log(300)) < 0.1


@pytest.mark.parametrize(
    ("num_layers", "d_model", "num_heads", "parameters"),
    [
        (12, 768, 12, 124_439_808),
        (24, 1024, 16, 354_823_168),
        (36, 1280, 20, 774_030_080),
        (48, 1600, 25, 1_557_611_200),
    ],
)
def test_gpt2_has_its_published_number_of_parameters(num_layers, d_model, num_heads, parameters):
    with torch.device("meta"):
        model = GPT(GPTConfig(50257, num_layers, d_model, num_heads, 1024, fused=False))
    assert model.config.padded_vocab_size == 50304
    assert model.num_parameters(with_positions=True) == parameters
    without_positions = parameters - 1024 * d_model
    assert model.num_parameters() == without_positions
    assert model.flops_per_token(512) == 6 * without_positions + 12 * num_layers * 512 * d_model


def test_linear_weights_are_all_matrices_but_the_tables():
    model = tiny()
    linear = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not model.head
    }
    for name, parameter in model.named_parameters():
        is_table = name.startswith("embedding.")
        assert (id(parameter) in linear) == (parameter.ndim == 2 and not is_table), name


def test_dropout_acts_in_training_only():
    model = tiny(resid_dropout=0.5, embd_dropout=0.25, attn_dropout=0.5)
    assert model.blocks[0].norm1.dropout_p == 0.25
    assert model.blocks[1].norm1.dropout_p == model.norm.dropout_p == 0.5
    tokens = random_tokens()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    expected = reference_logits(model, tokens)
    torch.testing.assert_close(model(tokens)[..., :37].double(), expected, rtol=0, atol=2e-5)


def loss_and_gradients(
    model: GPT, inputs: Sequence[Tensor | None], autocast: bool = False
) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(*inputs)
    loss.backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters()}
    return {"loss": loss.detach().double()} | gradients


def assert_as_exact(model: GPT, plain: GPT, autocast: bool, *documents_and_positions: Tensor):
    """Loss and gradients of `model` and of the plain one with its weights, against fp64's."""
    plain.load_state_dict(model.state_dict())
    errors: dict[str, list[tuple[float, float]]] = {}
    # In bf16 the largest error of a few dozen numbers is a matter of luck: a ReLU that is off in
    # one and on in the other is much of it. Over 4 batches it is not.
    for batch in range(4 if autocast else 1):
        tokens = (random_tokens(seed=2 * batch + 1), random_tokens(seed=2 * batch + 2))
        inputs = (*tokens, *documents_and_positions)
        exact = loss_and_gradients(plain.double(), inputs)
        theirs = loss_and_gradients(plain.float(), inputs, autocast)
        for name, ours in loss_and_gradients(model, inputs, autocast).items():
            pair = (max_error(ours, exact[name]), max_error(theirs[name], exact[name]))
            errors.setdefault(name, []).append(pair)
    for name, pairs in errors.items():
        error, plain_error = (max(column) for column in zip(*pairs, strict=True))
        if name == "loss":
            # That of 24 tokens in bf16 (8 bits) is off by some 1e-3 either way.
            assert error <= 2 * plain_error + (3e-3 if autocast else 1e-6)
        else:
            assert error <= 3 * plain_error + (1e-4 if autocast else 1e-5), name


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("overrides", OPTIONS.values(), ids=OPTIONS)
def test_fused_and_plain_agree(overrides, autocast):
    assert_as_exact(tiny(**overrides, fused=True), tiny(**overrides), autocast)


@pytest.mark.parametrize("overrides", [{}, {"rotary_fraction": 1.0}, {"alibi": True, "window": 3}])
def test_fused_and_plain_agree_on_documents(overrides):
    documents = torch.tensor([[0, 5, 6, 12], [0, 12, 12, 12]], dtype=torch.int32)
    positions = torch.tensor([[*range(5), 0, *range(6)], [*range(12)]])
    fused, plain = tiny(**overrides, fused=True), tiny(**overrides)
    assert_as_exact(fused, plain, False, documents, positions)


FUSIONS = ("fused_norm", "fused_attention", "fused_mlp", "fused_loss")


@pytest.mark.parametrize("key", FUSIONS)
def test_each_fusion_has_a_key(key):
    """With one left on, that one's ops are called and no others."""
    others = {name: False for name in FUSIONS if name != key}
    expected = {
        "fused_norm": {"layer_norm_forward"},
        "fused_attention": {"attention_forward", "rotary_"},
        "fused_mlp": {"fused_dense_forward"},
        "fused_loss": {"linear_cross_entropy_forward_backward"},
    }
    model = tiny(fused=True, rotary_fraction=1.0, **others)
    inputs = (random_tokens(seed=1), random_tokens(seed=2))
    with torch.profiler.profile() as profile:
        model(*inputs)
    ops = " ".join(sorted({event.name for event in profile.events()}))
    for fusion, words in expected.items():
        for word in words:
            found = f"flashtrain::{word}" in ops
            assert found == (fusion == key), (word, ops)
    assert_as_exact(model, tiny(rotary_fraction=1.0), autocast=False)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_compiles_without_graph_breaks(fused):
    model = tiny(fused=fused)
    tokens, targets = random_tokens(seed=1), random_tokens(seed=2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, targets), model(tokens, targets))
    compiled(tokens, targets).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_heads": 5}, "d_model=24 is not a multiple of model.num_heads=5"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"resid_dropout": 1.0}, r"resid_dropout=1.0 must lie in \[0, 1\)"),
        ({"activation": "gelu_aprox"}, "is unknown; did you mean 'gelu_approx'"),
        ({"norm": "batch_norm"}, "model.norm='batch_norm' is unknown; did you mean"),
        ({"block": "sandwich"}, "is unknown; valid: pre_norm, post_norm, parallel"),
        ({"num_kv_heads": 2}, "num_heads=3 is not a multiple of model.num_kv_heads=2"),
        ({"rotary_fraction": 1.5}, "rotary_fraction=1.5 must be at most 1"),
        ({"num_layers": 10**9}, "num_layers=1000000000 must be at most 10000"),
        ({"d_model": 24.0}, "model.d_model=24.0 must be int"),
        ({"num_layers": True}, "model.num_layers=True must be int"),
        ({"vocab_size": 10**9, "d_model": 3 * 10**6}, "parameters; supported: at most 1e.12"),
        ({"init_std": math.nan}, "model.init_std=nan must"),
        ({"init_std": math.inf}, "model.init_std=inf must"),
        ({"init_std": -0.02}, "model.init_std=-0.02 must be at least 0"),
        ({"embd_dropout": math.nan}, "model.embd_dropout=nan must"),
        ({"layer_norm_eps": -1e-5}, "model.layer_norm_eps=-1e-05 must be at least 0"),
        ({"rotary_base": 0.0}, "model.rotary_base=0.0 must"),
        ({"mlp_ratio": math.inf}, "model.mlp_ratio=inf must"),
        ({"tie_embeddings": "no"}, "model.tie_embeddings='no' must be bool"),
        ({"mlp_ratio": 0.0}, "mlp_ratio=0.0 leaves the MLP no width"),
        ({"block": "post_norm", "residual_in_fp32": True}, "set it to false"),
    ],
)
def test_unusable_configs_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny(**overrides)


def test_unusable_calls_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match="13 tokens came, max_seq_len is 12"):
        model(random_tokens(seq_len=13))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("wrong", [-1, 37, 127, 128, 2**31])
def test_ids_outside_the_vocabulary_are_refused(wrong, fused):
    """Those in the rows that pad the tables, too: they would be silent zeros."""
    model = tiny(fused=fused)
    tokens, targets = random_tokens(seed=1), random_tokens(seed=2)
    bad = tokens.clone()
    bad[1, 3] = wrong
    with pytest.raises(ValueError, match=rf"token id {wrong} came; supported: 0\.\.36"):
        model(bad)
    with pytest.raises(ValueError, match=rf"token id {wrong} came; supported: 0\.\.36"):
        model.generate(bad, 1)
    with pytest.raises(ValueError, match=rf"{wrong}( came|; a label must be)"):
        model(tokens, bad)
    positions = torch.arange(12).expand(2, 12).clone()
    positions[0, 0] = 12
    with pytest.raises(ValueError, match=r"position 12 came; supported: 0\.\.11"):
        model(tokens, targets, None, positions)
