"""The building blocks one by one; `models/gpt_test.py` tests them together."""

import math

import pytest
import torch
import torch.nn.functional as F

from flashtrain.modules.add_norm import DropoutAddNorm
from flashtrain.modules.attention import CausalSelfAttention
from flashtrain.modules.embedding import TokenPositionEmbedding
from flashtrain.modules.mlp import ACTIVATIONS, Mlp


def random_norm(d_model: int, **options) -> DropoutAddNorm:
    torch.manual_seed(0)
    norm = DropoutAddNorm(d_model, **options)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    return norm


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_add_norm_is_its_formula(fused, with_residual):
    norm = random_norm(24, fused=fused, eps=1e-3)
    branch = torch.randn(2, 5, 24)
    residual = torch.randn(2, 5, 24) if with_residual else None
    z, x = norm(branch, residual)
    expected_x = branch.double() + (0.0 if residual is None else residual.double())
    centred = expected_x - expected_x.mean(-1, keepdim=True)
    scale = torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-3)
    expected_z = centred / scale * norm.weight.double() + norm.bias.double()
    torch.testing.assert_close(x.double(), expected_x, rtol=0, atol=1e-6)
    torch.testing.assert_close(z.double(), expected_z, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_add_norm_keeps_the_residual_in_fp32_where_asked(fused):
    branch = torch.randn(2, 5, 24, dtype=torch.bfloat16)
    for residual_in_fp32, x_dtype in ((True, torch.float32), (False, torch.bfloat16)):
        norm = random_norm(24, fused=fused, residual_in_fp32=residual_in_fp32)
        z, x = norm(branch, None)
        assert (z.dtype, x.dtype) == (torch.bfloat16, x_dtype)
        z, x = norm(branch, x)
        assert (z.dtype, x.dtype) == (torch.bfloat16, x_dtype)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_add_norm_drops_the_branch_and_not_the_residual(fused):
    norm = random_norm(64, fused=fused, dropout_p=0.25)
    branch, residual = torch.ones(400, 1, 64), torch.full((400, 1, 64), 10.0)
    _, x = norm(branch, residual)
    values = torch.unique(x)
    torch.testing.assert_close(values, torch.tensor([10.0, 10.0 + 1 / 0.75]))
    dropped = (x == 10.0).double().mean().item()
    # 5 standard errors of a frequency over 25,600 draws
    assert abs(dropped - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 25_600)
    _, x = norm.eval()(branch, residual)
    assert (x == 11.0).all()


def test_attention_is_its_formula():
    torch.manual_seed(0)
    attention = CausalSelfAttention(24, 3, softmax_scale=0.7).double()
    x = torch.randn(2, 6, 24, dtype=torch.float64)
    q, k, v = F.linear(x, attention.qkv.weight, attention.qkv.bias).split(24, dim=-1)
    heads = []
    for head in range(3):
        cols = slice(8 * head, 8 * head + 8)
        scores = 0.7 * q[..., cols] @ k[..., cols].transpose(1, 2)
        scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf)
        heads.append(torch.softmax(scores, -1) @ v[..., cols])
    expected = F.linear(torch.cat(heads, -1), attention.out.weight, attention.out.bias)
    torch.testing.assert_close(attention(x), expected)


def test_attention_refuses_a_width_its_heads_do_not_divide():
    with pytest.raises(ValueError, match="d_model=10 is not a multiple of num_heads=3"):
        CausalSelfAttention(10, 3)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("gelu", lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))),
        ("gelu_approx", lambda x: F.gelu(x, approximate="tanh")),
        ("relu", lambda x: x.clamp(min=0)),
        ("sqrelu", lambda x: x.clamp(min=0) ** 2),
    ],
)
def test_mlp_is_its_formula(activation, function):
    torch.manual_seed(0)
    mlp = Mlp(6, 24, activation=activation).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    hidden = function(x @ mlp.fc1.weight.T + mlp.fc1.bias)
    torch.testing.assert_close(mlp(x), hidden @ mlp.fc2.weight.T + mlp.fc2.bias)


def test_mlp_names_the_activations_it_has():
    with pytest.raises(ValueError, match=", ".join(ACTIVATIONS)):
        Mlp(6, 24, activation="swish")
    with pytest.raises(ValueError, match="did you mean 'gelu_approx'"):
        Mlp(6, 24, activation="gelu_aprox")


def test_embedding_adds_tokens_and_positions():
    embedding = TokenPositionEmbedding(10, 4, 3)
    x = embedding(torch.tensor([[7, 7, 2]]))
    expected = embedding.tokens.weight[[7, 7, 2]] + embedding.positions.weight[:3]
    torch.testing.assert_close(x, expected[None])
    with torch.autocast("cpu", torch.bfloat16):
        assert embedding(torch.tensor([[7, 7, 2]])).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="5 tokens came, max_seq_len is 4"):
        embedding(torch.zeros(1, 5, dtype=torch.int64))
