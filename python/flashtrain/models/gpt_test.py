"""GPT against an independent implementation in fp64, and the promises of its docstrings."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flashtrain.models.gpt import GPT, GPTConfig

TINY = {"vocab_size": 37, "num_layers": 2, "d_model": 24, "num_heads": 3, "max_seq_len": 12}


def tiny_config(**overrides: Any) -> GPTConfig:
    return GPTConfig(**{**TINY, "fused": False, **overrides})


def tiny(seed: int = 0, **overrides: Any) -> GPT:
    """A small model whose every parameter is random, biases and norms too."""
    torch.manual_seed(seed)
    model = GPT(tiny_config(**overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_tokens(batch: int = 2, seq_len: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, TINY["vocab_size"], (batch, seq_len), generator=generator)


def reference_logits(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """GPT-2 as its papers have it, one sequence and one head at a time, in fp64."""
    config = model.config
    p = {name: tensor.double() for name, tensor in model.named_parameters()}

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred**2).mean(-1, keepdim=True)
        z = centred / torch.sqrt(variance + config.layer_norm_eps)
        return z * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def attention(x, layer):
        seq_len, head_dim = x.shape[0], config.d_model // config.num_heads
        qkv = linear(x, f"blocks.{layer}.attention.qkv")
        q, k, v = qkv.split(config.d_model, dim=-1)
        heads = []
        for head in range(config.num_heads):
            cols = slice(head * head_dim, (head + 1) * head_dim)
            scores = q[:, cols] @ k[:, cols].T / math.sqrt(head_dim)
            if config.scale_attn_by_inverse_layer_idx:
                scores = scores / (layer + 1)
            future = torch.ones(seq_len, seq_len).triu(1).bool()
            weights = torch.softmax(scores.masked_fill(future, -math.inf), dim=-1)
            heads.append(weights @ v[:, cols])
        return linear(torch.cat(heads, dim=-1), f"blocks.{layer}.attention.out")

    head = p.get("head.weight", p["embedding.tokens.weight"])
    rows = []
    for sequence in tokens:
        x = p["embedding.tokens.weight"][sequence]
        x = x + p["embedding.positions.weight"][: len(sequence)]
        for layer in range(config.num_layers):
            block = f"blocks.{layer}"
            x = x + attention(norm(x, f"{block}.norm1"), layer)
            hidden = gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
            x = x + linear(hidden, f"{block}.mlp.fc2")
        rows.append(norm(x, "norm") @ head.T)
    return torch.stack(rows)[..., : config.vocab_size]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"scale_attn_by_inverse_layer_idx": True},
        {"tie_embeddings": False},
        {"mlp_ratio": 2, "layer_norm_eps": 1e-2},
        {"residual_in_fp32": True},
        {"pad_vocab_size_multiple": 1},
    ],
    ids=lambda overrides: ",".join(overrides) or "default",
)
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


def test_gradients_equal_the_reference():
    model = tiny(scale_attn_by_inverse_layer_idx=True).double()
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


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_fused_and_plain_agree(autocast):
    plain, fused = tiny(num_layers=3), tiny(num_layers=3, fused=True)
    fused.load_state_dict(plain.state_dict())
    tokens, targets = random_tokens(seed=1), random_tokens(seed=2)
    exact = plain.double()(tokens, targets)
    exact.backward()
    exact_gradients = [p.grad.clone() for p in plain.parameters()]
    plain.float().zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain_loss, fused_loss = plain(tokens, targets), fused(tokens, targets)
    plain_loss.backward()
    fused_loss.backward()
    # A loss of 48 tokens in bf16 (8 bits) is off by some 1e-3 either way.
    assert abs(fused_loss - exact) <= 2 * abs(plain_loss - exact) + (3e-3 if autocast else 1e-6)
    atol = 1e-4 if autocast else 1e-5
    for exact_gradient, p, f in zip(
        exact_gradients, plain.parameters(), fused.parameters(), strict=True
    ):
        plain_error = (p.grad - exact_gradient).abs().max()
        assert (f.grad - exact_gradient).abs().max() <= 3 * plain_error + atol


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_compiles_without_graph_breaks(fused):
    model = tiny(fused=fused)
    tokens, targets = random_tokens(seed=1), random_tokens(seed=2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, targets), model(tokens, targets))
    compiled(tokens, targets).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_generate_is_greedy_at_temperature_zero():
    model = tiny()
    prompt = random_tokens(seq_len=3)
    expected = prompt
    for _ in range(15):  # past max_seq_len: the window slides
        logits = reference_logits(model, expected[:, -12:])
        expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(prompt, 15, temperature=0.0), expected)
    assert torch.equal(model.generate(prompt, 15, top_k=1), expected)


def test_generate_is_a_function_of_the_generator():
    model = tiny()
    prompt = random_tokens(seq_len=3)

    def sample(seed, **options):
        return model.generate(prompt, 40, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert sample(1).shape == (2, 43)
    assert torch.equal(sample(1)[:, :3], prompt)
    hot = sample(1, temperature=1e3)  # all but uniform: every real token may come, no padding
    assert hot.max() < 37


def test_generate_with_top_k_stays_among_the_likeliest():
    model = tiny()
    prompt = random_tokens(batch=1, seq_len=3)
    allowed = set(reference_logits(model, prompt)[0, -1].topk(4).indices.tolist())
    generator = torch.Generator().manual_seed(0)
    drawn = {
        model.generate(prompt, 1, temperature=5.0, top_k=4, generator=generator)[0, -1].item()
        for _ in range(100)
    }
    assert drawn == allowed


def test_generate_draws_by_the_softmax():
    model = tiny()
    prompt = random_tokens(batch=1, seq_len=3)
    probabilities = torch.softmax(reference_logits(model, prompt)[0, -1] / 0.5, dim=-1)
    generator = torch.Generator().manual_seed(0)
    draws = model.generate(prompt.repeat(20_000, 1), 1, temperature=0.5, generator=generator)
    frequencies = torch.bincount(draws[:, -1], minlength=37) / 20_000
    assert (frequencies - probabilities).abs().max() < 5 * 0.5 / math.sqrt(20_000)


def test_generate_leaves_the_mode_as_it_was():
    model = tiny(resid_dropout=0.9)
    greedy = model.eval().generate(random_tokens(), 3, temperature=0.0)
    model.train()
    assert torch.equal(model.generate(random_tokens(), 3, temperature=0.0), greedy)
    assert model.training
    assert model.blocks[0].training


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_heads": 5}, "d_model=24 is not a multiple of model.num_heads=5"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"resid_dropout": 1.0}, r"resid_dropout=1.0 must be in \[0, 1\)"),
        ({"activation": "swish"}, "activation='swish' is unknown; valid: gelu, gelu_approx"),
    ],
)
def test_unusable_configs_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny(**overrides)


def test_unusable_calls_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match="13 tokens came, max_seq_len is 12"):
        model(random_tokens(seq_len=13))
    with pytest.raises(ValueError, match="the prompt is empty"):
        model.generate(random_tokens(seq_len=0), 1)
    with pytest.raises(ValueError, match="temperature=-1"):
        model.generate(random_tokens(), 1, temperature=-1.0)
    with pytest.raises(ValueError, match="top_k=0"):
        model.generate(random_tokens(), 1, top_k=0)
