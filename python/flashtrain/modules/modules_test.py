"""The building blocks one by one; the models' tests use them together."""

import math

import pytest
import torch
import torch.nn.functional as F

from flashtrain.modules.add_norm import DropoutAddNorm, ParallelDropoutAddNorm
from flashtrain.modules.embedding import PatchEmbedding, TokenPositionEmbedding
from flashtrain.modules.head import LanguageModelHead
from flashtrain.modules.mlp import ACTIVATIONS, GATES, GatedMlp, Mlp


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


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("tied", [False, True])
def test_parallel_add_norm_is_its_formula(tied, norm, fused):
    torch.manual_seed(0)
    module = ParallelDropoutAddNorm(24, norm=norm, tied=tied, eps=1e-3, fused=fused)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    first, second, residual = torch.randn(3, 2, 5, 24).unbind(0)
    for branch1, stream in ((second, residual), (None, None), (second, None)):
        z0, z1, x = module(first, branch1, stream)
        expected = first.double()
        for term in (branch1, stream):
            expected = expected if term is None else expected + term.double()
        torch.testing.assert_close(x.double(), expected, rtol=0, atol=1e-6)
        for z, parameters in ((z0, module), (z1, module if tied else module.norm1)):
            centred = expected
            if norm == "layer_norm":
                centred = expected - expected.mean(-1, keepdim=True)
            scale = torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-3)
            expected_z = centred / scale * parameters.weight.double()
            if norm == "layer_norm":
                expected_z = expected_z + parameters.bias.double()
            torch.testing.assert_close(z.double(), expected_z, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_parallel_add_norm_drops_each_branch_by_itself(fused):
    norm = ParallelDropoutAddNorm(64, tied=True, dropout_p=0.25, fused=fused)
    ones, residual = torch.ones(400, 1, 64), torch.full((400, 1, 64), 10.0)
    _, _, x = norm(ones, 2 * ones, residual)
    kept = 1 / 0.75
    values = torch.tensor([10.0, 10.0 + kept, 10.0 + 2 * kept, 10.0 + 3 * kept])
    for value, p in zip(values, (0.0625, 0.1875, 0.1875, 0.5625), strict=True):
        share = ((x - value).abs() < 1e-4).double().mean().item()
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / 25_600), value
    _, _, x = norm.eval()(ones, 2 * ones, residual)
    assert (x == 13.0).all()


def test_norms_have_names():
    with pytest.raises(ValueError, match="norm='rmsnorm' is unknown; did you mean 'rms_norm'"):
        DropoutAddNorm(8, norm="rmsnorm", fused=False)


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
    mlp = Mlp(6, 24, activation=activation, fused=False).double()
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


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("glu", lambda x: 1 / (1 + torch.exp(-x))),
        ("geglu", lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))),
        ("swiglu", lambda x: x / (1 + torch.exp(-x))),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_gated_mlp_is_its_formula(activation, function, bias):
    torch.manual_seed(0)
    mlp = GatedMlp(6, 10, activation=activation, bias=bias).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    y, gate = F.linear(x, mlp.fc1.weight, mlp.fc1.bias).split(10, dim=-1)
    torch.testing.assert_close(mlp(x), F.linear(y * function(gate), mlp.fc2.weight, mlp.fc2.bias))
    with pytest.raises(ValueError, match=", ".join(GATES)):
        GatedMlp(6, 10, activation="abc")


@pytest.mark.parametrize("activation", ["gelu_approx", "relu", "sqrelu"])
@pytest.mark.parametrize("bias", [False, True])
def test_fused_mlp_equals_the_plain_one(activation, bias):
    torch.manual_seed(0)
    fused = Mlp(8, 24, activation=activation, bias=bias)
    plain = Mlp(8, 24, activation=activation, bias=bias, fused=False)
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-6)


def test_patches_are_a_convolution():
    torch.manual_seed(0)
    embedding = PatchEmbedding(4, 3, 10).double()
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    weight = embedding.projection.weight.view(10, 3, 4, 4)
    expected = F.conv2d(images, weight, embedding.projection.bias, stride=4)
    torch.testing.assert_close(embedding(images), expected.flatten(2).transpose(1, 2))


def test_positions_may_be_given():
    embedding = TokenPositionEmbedding(10, 4, 3)
    tokens = torch.tensor([[7, 7, 2], [1, 2, 3]])
    positions = torch.tensor([[3, 0, 1], [2, 2, 2]])
    expected = embedding.tokens.weight[tokens] + embedding.positions.weight[positions]
    torch.testing.assert_close(embedding(tokens, positions), expected)
    without = TokenPositionEmbedding(10, None, 3)
    assert [name for name, _ in without.named_parameters()] == ["tokens.weight"]
    assert torch.equal(without(tokens), without.tokens.weight[tokens])


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_head_knows_no_padding(fused):
    torch.manual_seed(0)
    head = LanguageModelHead(8, 13, 16, fused=fused)
    hidden, targets = torch.randn(2, 5, 8), torch.randint(0, 13, (2, 5))
    assert (head(hidden)[..., 13:] == -math.inf).all()
    logits = hidden @ head.weight[:13].T
    loss = head.loss(hidden, targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    loss.backward()
    assert (head.weight.grad[13:] == 0).all()
