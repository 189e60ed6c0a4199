"""The models inside torch.compile, DistributedDataParallel and the like, and their modes.

config = unwrap(torch.compile(model), GPT).config
with evaluating(model):
    logits = model(tokens)
"""

import contextlib
from collections.abc import Iterator
from typing import TypeVar

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

Module = TypeVar("Module", bound=nn.Module)

# What torch.compile and checkpoint_wrapper call the module inside, in names of parameters too.
_INNER = ("_orig_mod", "_checkpoint_wrapped_module")
# The same of FullyShardedDataParallel, whose parameters are pieces without their shape.
_FSDP_INNER = "_fsdp_wrapped_module"


def unwrap(model: nn.Module, kind: type[Module]) -> Module:
    """The model of a class inside any number of torch's wrappers.

    Raises:
        TypeError: it is of another class.
    """
    inner = model
    while (wrapped := _inside(inner)) is not None:
        inner = wrapped
    if not isinstance(inner, kind):
        raise TypeError(
            f"the model is a {type(inner).__name__}; supported: a {kind.__name__}, also inside "
            "torch.compile, DataParallel or DistributedDataParallel"
        )
    return inner


def _inside(module: nn.Module) -> nn.Module | None:
    if isinstance(module, DataParallel | DistributedDataParallel):
        return module.module
    children = getattr(module, "_modules", {})
    return next((children[name] for name in _INNER if name in children), None)


def whole_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by their names in the plain model, whichever of its modules are wrapped.

    Raises:
        ValueError: they are split among ranks.
    """
    parameters = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if _FSDP_INNER in parts or hasattr(parameter, "device_mesh"):
            raise ValueError(
                f"parameter {name} is split among ranks (FullyShardedDataParallel, fully_shard); "
                "supported: a model in one piece, such as load_model makes of a checkpoint"
            )
        parameters[".".join(part for part in parts if part not in _INNER)] = parameter
    return parameters


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode, and each of its modules back into its own in the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
