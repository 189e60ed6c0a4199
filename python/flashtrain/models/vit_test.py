"""ViT against an independent implementation in fp64, timm's names, and its docstrings' promises."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashtrain.models.timm_vit import load_state_from_timm, state_to_timm
from flashtrain.models.vit import SIZES, ViT, ViTConfig

TINY: dict[str, Any] = {
    **{"image_size": 12, "patch_size": 4, "num_channels": 3, "num_classes": 7},
    **{"num_layers": 3, "d_model": 24, "num_heads": 3},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "mean": {"pool": "mean"},
    "layer_scale": {"layer_scale": 0.1},
    "tanh_gelu": {"activation": "gelu_approx", "layer_norm_eps": 1e-2},
    "mlp_ratio": {"mlp_ratio": 1.5},
    "fp32_residual": {"residual_in_fp32": True},
    "checkpointing": {"activation_checkpointing": True},
    "gray": {"num_channels": 1, "patch_size": 3},
}


def tiny(seed: int = 0, **overrides: Any) -> ViT:
    """A small model whose every parameter is random."""
    torch.manual_seed(seed)
    model = ViT(ViTConfig(**{**TINY, "fused": False, **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_batch(model: ViT, batch: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Floats, as every bit of them counts."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, config.num_channels, config.image_size, config.image_size)
    images = torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, config.num_classes, (batch,), generator=generator)
    return images.to(model.head.weight.dtype), labels


def reference_logits(config: ViTConfig, state: dict[str, Tensor], images: Tensor) -> Tensor:
    """ViT as timm computes it, from a state dict with timm's names: one head at a time, in fp64."""
    p = {name: tensor.double() for name, tensor in state.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        z = x / torch.sqrt((x**2).mean(-1, keepdim=True) + config.layer_norm_eps)
        return z * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        if config.activation == "gelu":
            return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def attention(x: Tensor, name: str) -> Tensor:
        head_dim = config.d_model // config.num_heads
        q, k, v = (part.split(head_dim, -1) for part in linear(x, f"{name}.qkv").chunk(3, -1))
        heads = []
        for head in range(config.num_heads):
            scores = q[head] @ k[head].transpose(1, 2) / math.sqrt(head_dim)
            weights = torch.exp(scores - scores.amax(-1, keepdim=True))
            heads.append(weights / weights.sum(-1, keepdim=True) @ v[head])
        return linear(torch.cat(heads, dim=-1), f"{name}.proj")

    x = F.conv2d(
        images.double(),
        p["patch_embed.proj.weight"],
        p["patch_embed.proj.bias"],
        stride=config.patch_size,
    )
    x = x.flatten(2).transpose(1, 2)
    if "cls_token" in p:
        x = torch.cat([p["cls_token"].expand(len(x), -1, -1), x], dim=1)
    x = x + p["pos_embed"]
    for i in range(config.num_layers):
        name = f"blocks.{i}"
        branch = attention(norm(x, f"{name}.norm1"), f"{name}.attn")
        x = x + branch * p.get(f"{name}.ls1.gamma", 1.0)
        branch = linear(
            gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2"
        )
        x = x + branch * p.get(f"{name}.ls2.gamma", 1.0)
    x = norm(x, "norm")
    return linear(x[:, 0] if "cls_token" in p else x.mean(1), "head")


@pytest.mark.parametrize("overrides", OPTIONS.values(), ids=OPTIONS)
def test_logits_and_gradients_equal_the_reference(overrides):
    model = tiny(**overrides).double()
    images, labels = random_batch(model)
    loss = model(images, labels)
    loss.backward()
    state = {n: t.requires_grad_() for n, t in state_to_timm(model).items()}
    expected = reference_logits(model.config, state, images)
    torch.testing.assert_close(model(images), expected)
    expected_loss = F.cross_entropy(expected, labels)
    torch.testing.assert_close(loss, expected_loss)
    expected_loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    for name, gradient in state_to_timm(model).items():
        torch.testing.assert_close(gradient, state[name].grad, rtol=1e-9, atol=1e-12)


def test_gradients_equal_finite_differences():
    model = tiny(num_layers=1, d_model=8, num_heads=2, layer_scale=0.5).double()
    images, labels = random_batch(model, batch=2)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def loss(*values):
        overridden = dict(zip(names, values, strict=True))
        return torch.func.functional_call(model, overridden, (images, labels))

    assert torch.autograd.gradcheck(loss, parameters, fast_mode=True)


@pytest.mark.parametrize("overrides", OPTIONS.values(), ids=OPTIONS)
def test_fused_and_plain_agree(overrides):
    plain, fused = tiny(**overrides), tiny(**{**overrides, "fused": True})
    fused.load_state_dict(plain.state_dict())
    images, labels = random_batch(plain)
    exact = plain.double()(images.double(), labels)
    exact.backward()
    exact_gradients = [p.grad.clone() for p in plain.parameters()]
    plain.float().zero_grad()
    for model in (plain, fused):
        loss = model(images, labels)
        assert loss.dtype == torch.float32
        assert abs(loss - exact) <= 1e-5
        loss.backward()
    for exact_gradient, p, f in zip(
        exact_gradients, plain.parameters(), fused.parameters(), strict=True
    ):
        plain_error = (p.grad - exact_gradient).abs().max()
        assert (f.grad - exact_gradient).abs().max() <= 3 * plain_error + 1e-5


def test_bytes_are_scaled():
    model = tiny()
    images = torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8)
    torch.testing.assert_close(model(images), model(images.float() / 127.5 - 1.0))


def test_a_new_model_knows_no_class():
    model = ViT(ViTConfig(**TINY, fused=False))
    loss = model(*random_batch(model))
    assert loss.item() == pytest.approx(math.log(7), abs=1e-6)


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("Ti", 5_717_416), ("S", 22_050_664), ("B", 86_567_656), ("L", 304_326_632)],
)
def test_sizes_have_their_published_numbers_of_parameters(size, parameters):
    shape: dict[str, Any] = {
        "image_size": 224,
        "patch_size": 16,
        "num_channels": 3,
        "num_classes": 1000,
    }
    with torch.device("meta"):
        model = ViT(ViTConfig(**shape, **SIZES[size], fused=False))
    assert model.num_parameters(with_positions=True) == parameters
    assert model.config.seq_len == 197


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_stochastic_depth_drops_whole_branches(fused):
    """The last block's drop_path is the key's value, the first one's is 0."""
    model = tiny(drop_path=0.5, layer_scale=1.0, fused=fused)
    assert [block.norm2.drop_path_p for block in model.blocks] == [0.0, 0.25, 0.5]
    assert [block.norm1.drop_path_p for block in model.blocks] == [0.0, 0.0, 0.25]
    assert model.norm.drop_path_p == 0.5
    branch, residual = torch.ones(4_000, 3, 24), torch.zeros(4_000, 3, 24)
    with torch.no_grad():
        model.norm.get_parameter("layer_scale").fill_(1.0)
    _, x = model.norm.train()(branch, residual)
    assert (x == x[:, :1, :1]).all()  # whole samples
    assert set(x.unique().tolist()) == {0.0, 2.0}
    # 5 standard errors of a frequency over 4,000 draws
    assert abs((x[:, 0, 0] == 0).double().mean() - 0.5) < 5 * 0.5 / math.sqrt(4_000)
    _, x = model.norm.eval()(branch, residual)
    assert (x == 1.0).all()


def test_regularisation_acts_in_training_only():
    options: dict[str, Any] = {
        "dropout": 0.3,
        "attn_dropout": 0.3,
        "drop_path": 0.3,
        "label_smoothing": 0.1,
    }
    model = tiny(**options)
    images, labels = random_batch(model)
    assert not torch.equal(model(images), model(images))
    model.eval()
    expected = reference_logits(model.config, state_to_timm(model), images)
    torch.testing.assert_close(model(images).double(), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(
        model(images, labels).double(), F.cross_entropy(expected, labels), rtol=0, atol=2e-5
    )


def test_label_smoothing():
    model = tiny(label_smoothing=0.2)
    images, labels = random_batch(model)
    log_p = model(images).log_softmax(-1)
    expected = -(0.8 * log_p[range(4), labels] + 0.2 * log_p.mean(-1)).mean()
    torch.testing.assert_close(model(images, labels), expected)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_compiles_without_graph_breaks(fused):
    model = tiny(fused=fused, layer_scale=0.1)
    images, labels = random_batch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, labels), model(images, labels))
    compiled(images, labels).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("overrides", OPTIONS.values(), ids=OPTIONS)
def test_timm_round_trip_is_exact(overrides):
    model, other = tiny(**overrides), tiny(seed=1, **overrides)
    load_state_from_timm(other, state_to_timm(model))
    for (name, expected), found in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(expected, found), name


@pytest.mark.parametrize(
    "recorded",
    json.loads(Path(__file__).with_name("timm_vit_shapes.json").read_text()),
    ids=lambda recorded: recorded["model"],
)
def test_names_and_shapes_are_those_of_timm(recorded):
    with torch.device("meta"):
        model = ViT(ViTConfig(**recorded["config"], fused=False))
    shapes = {name: list(tensor.shape) for name, tensor in state_to_timm(model).items()}
    assert shapes == recorded["shapes"]


@pytest.mark.parametrize("overrides", [{}, {"pool": "mean", "layer_scale": 0.1}], ids=["", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_timm_computes_the_same(overrides, dtype, fused):
    """Where timm is installed, which no lock has: it needs a torchvision."""
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    options: dict[str, Any] = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    torch.manual_seed(0)
    theirs = vision_transformer.VisionTransformer(
        img_size=12,
        patch_size=4,
        num_classes=7,
        embed_dim=24,
        depth=3,
        num_heads=3,
        **({**options, "init_values": 0.1} if overrides else {}),
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = tiny(**overrides, fused=fused)
    load_state_from_timm(ours, theirs.state_dict())
    images, _ = random_batch(ours)
    exact = theirs.double()(images.double())
    their_error = (theirs.to(dtype)(images.to(dtype)) - exact).abs().max()
    error = (ours.to(dtype)(images.to(dtype)) - exact).abs().max()
    assert error <= 3 * their_error + (1e-6 if dtype == torch.float32 else 1e-3)


def test_what_does_not_fit_is_named():
    model = tiny()
    state = state_to_timm(model)
    del state["blocks.1.attn.qkv.bias"]
    state["blocks.0.ls1.gamma"] = torch.ones(24)
    state["head.weight"] = torch.zeros(9, 24)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="file does not fit the model") as refusal:
        load_state_from_timm(model, state, source="file")
    assert str(refusal.value).endswith(
        "missing: blocks.1.attn.qkv.bias; unexpected: blocks.0.ls1.gamma; "
        "misshapen: head.weight is [9, 24] instead of [7, 24]"
    )
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(ValueError, match="'swiglu' has no form in timm's ViT"):
        state_to_timm(tiny(activation="swiglu"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"patch_size": 5}, "image_size=12 is not a multiple of model.patch_size=5"),
        ({"num_classes": 0}, "num_classes=0 must be at least 1"),
        ({"drop_path": 1.0}, r"drop_path=1.0 must lie in \[0, 1\)"),
        ({"pool": "max"}, "model.pool='max' is unknown; did you mean 'mean'"),
        ({"init_std": math.nan}, "model.init_std=nan must"),
        ({"num_layers": 10**9}, "num_layers=1000000000 must be at most 10000"),
        ({"mlp_ratio": 1e-9}, "mlp_ratio=1e-09 leaves the MLP no width"),
        ({"num_classes": 10**9, "d_model": 3 * 10**6}, "parameters; supported: at most"),
        ({"layer_scale": -1.0}, "layer_scale=-1.0 must be at least 0"),
    ],
)
def test_unusable_configs_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny(**overrides)


def test_other_images_are_refused():
    model = tiny()
    for shape in ((2, 3, 12, 8), (2, 1, 12, 12), (3, 12, 12)):
        with pytest.raises(ValueError, match=r"supported: \[B, 3, 12, 12\]"):
            model(torch.zeros(shape))


def test_labels_that_are_no_class_are_refused():
    model = tiny()
    images, labels = random_batch(model)
    labels[1] = 7
    with pytest.raises(ValueError, match=r"label 7 came; supported: 0\.\.6 and -100"):
        model(images, labels)
