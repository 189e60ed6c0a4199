"""flashtrain's C++ and CUDA kernels: thin bindings over cc/, for the modules of flashtrain.ops.

A tensor is anything that speaks DLPack: an object whose type has `__dlpack_c_exchange_api__`
(torch), a capsule of `torch.utils.dlpack.to_dlpack`, or an object with `__dlpack__` (numpy).
Outputs are tensors that the caller allocates; None in their place means "not wanted". All tensors
of a call are on one device; matrices are [..., cols] with adjacent columns and one stride from row
to row, all else is contiguous. `stream` is a cudaStream_t as an int (0: the default stream; ignored
on CPU).
Calls release the GIL, and on CUDA only enqueue.

Raises ValueError for an argument that does not fit (its name, what came, what is supported),
TypeError for one that is no tensor, RuntimeError for an error of the device.
"""

from collections.abc import Callable
from typing import Any

Tensor = Any

def set_num_threads(num_threads: int) -> None:
    """Threads that CPU ops may use from now on, process-wide, the calling thread included."""

def get_num_threads() -> int: ...
def layer_norm_forward(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rowscale: Tensor | None,
    layerscale: Tensor | None,
    rng_state: Tensor | None,
    dropout_p: float,
    epsilon: float,
    is_rms_norm: bool,
    zero_centered_weight: bool,
    z: Tensor,
    x: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    dropout_mask: Tensor | None,
    stream: int,
) -> None:
    """x = layerscale * dropout(rowscale * x0) + residual; z = norm(x) * weight + bias.

    Writes z [..., cols] (any float dtype), x [..., cols] (float32 or x0's dtype), mean and rstd
    [...] float32, dropout_mask [..., cols] uint8 (1 = kept). rng_state is {seed, offset}, int64
    [2]. The details are in cc/layer_norm/layer_norm.h.
    """

def layer_norm_backward(
    dz: Tensor,
    dx: Tensor | None,
    x: Tensor,
    x0: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    rowscale: Tensor | None,
    layerscale: Tensor | None,
    rng_state: Tensor | None,
    dropout_p: float,
    is_rms_norm: bool,
    zero_centered_weight: bool,
    dx0: Tensor | None,
    dresidual: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dlayerscale: Tensor | None,
    allocate: Callable[[int], Tensor],
    stream: int,
) -> None:
    """Gradients of layer_norm_forward. `dx` is that of its x; x0 is needed for dlayerscale only.

    `allocate(bytes)` returns a uint8 tensor [bytes] on the op's device, for the workspace; it is
    called at most once.
    """
