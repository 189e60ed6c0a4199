"""Cross entropy: `flashtrain.ops.cross_entropy`."""

from flashtrain.ops.cross_entropy import (
    CrossEntropyLoss,
    cross_entropy_loss,
)

__all__ = [
    "CrossEntropyLoss",
    "cross_entropy_loss",
]
