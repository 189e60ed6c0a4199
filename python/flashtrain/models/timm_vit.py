"""ViT weights in timm's form, both ways and bit for bit.

timm projects patches by a convolution, keeps class token and positions as [1, T, D], and layer
scale with the branch that it scales; here it is in the norm that adds the branch.

    load_state_from_timm(model, timm.create_model("vit_base_patch16_224").state_dict())
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flashtrain.models.vit import ViT
from flashtrain.models.vit_config import ViTConfig
from flashtrain.models.weights import check_names_and_shapes, copy_into
from flashtrain.models.wrapping import unwrap, whole_parameters
from flashtrain.modules.mlp import GATES

# Module of a block: (theirs, ours).
_BLOCK_MODULES = (
    ("norm1", "norm1"),
    ("attn.qkv", "attention.qkv"),
    ("attn.proj", "attention.out"),
    ("norm2", "norm2"),
    ("mlp.fc1", "mlp.fc1"),
    ("mlp.fc2", "mlp.fc2"),
)


def _names(config: ViTConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Their parameters: (our parameter, their shape, which holds the same numbers in order)."""
    if config.activation in GATES:
        raise ValueError(f"model.activation={config.activation!r} has no form in timm's ViT")
    width, patch = config.d_model, config.patch_size
    hidden = config.d_ff
    names: dict[str, tuple[str, tuple[int, ...]]] = {
        "pos_embed": ("positions", (1, config.seq_len, width)),
        "patch_embed.proj.weight": (
            "patches.projection.weight",
            (width, config.num_channels, patch, patch),
        ),
        "patch_embed.proj.bias": ("patches.projection.bias", (width,)),
        "norm.weight": ("norm.weight", (width,)),
        "norm.bias": ("norm.bias", (width,)),
        "head.weight": ("head.weight", (config.num_classes, width)),
        "head.bias": ("head.bias", (config.num_classes,)),
    }
    if config.pool == "class_token":
        names["cls_token"] = ("class_token", (1, 1, width))
    shapes = {
        "norm1": (width,),
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "norm2": (width,),
        "mlp.fc1": (hidden, width),
        "mlp.fc2": (width, hidden),
    }
    for i in range(config.num_layers):
        for theirs, ours in _BLOCK_MODULES:
            shape = shapes[theirs]
            names[f"blocks.{i}.{theirs}.weight"] = (f"blocks.{i}.{ours}.weight", shape)
            names[f"blocks.{i}.{theirs}.bias"] = (f"blocks.{i}.{ours}.bias", shape[:1])
        if config.layer_scale:
            adds_mlp = f"blocks.{i + 1}.norm1" if i + 1 < config.num_layers else "norm"
            names[f"blocks.{i}.ls1.gamma"] = (f"blocks.{i}.norm2.layer_scale", (width,))
            names[f"blocks.{i}.ls2.gamma"] = (f"{adds_mlp}.layer_scale", (width,))
    return names


def state_to_timm(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of timm's VisionTransformer with the same weights, copied.

    For pool="class_token" timm's default; for "mean" one with class_token=False,
    global_pool="avg", fc_norm=False.
    """
    vit = unwrap(model, ViT)
    own = whole_parameters(vit)
    return {
        theirs: own[ours].detach().clone().view(shape)
        for theirs, (ours, shape) in _names(vit.config).items()
    }


def load_state_from_timm(
    model: nn.Module, state: Mapping[str, Tensor], source: str = "state"
) -> None:
    """Copies a state dict of timm's VisionTransformer into a model of the same shape.

    Args:
        model: a ViT, also compiled or inside DistributedDataParallel.
        source: what error messages call the state.

    Raises:
        ValueError: names what is missing, unexpected or misshapen; nothing has been copied then.
    """
    vit = unwrap(model, ViT)
    names, parameters = _names(vit.config), whole_parameters(vit)
    expected = {theirs: torch.Size(shape) for theirs, (_, shape) in names.items()}
    check_names_and_shapes(source, state, expected)
    copy_into(
        parameters,
        {
            ours: state[theirs].reshape(parameters[ours].shape)
            for theirs, (ours, _) in names.items()
        },
    )
