"""Cross entropy: `flashtrain.ops.cross_entropy`."""

from flashtrain.ops.cross_entropy import (
    cross_entropy_loss,
)

__all__ = [
    "cross_entropy_loss",
]
