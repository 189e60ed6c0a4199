"""flashtrain's C++ and CUDA kernels: thin bindings over cc/, for the modules of flashtrain.ops.

A tensor is anything that speaks DLPack: an object whose type has `__dlpack_c_exchange_api__`
(torch), a capsule of `torch.utils.dlpack.to_dlpack`, or an object with `__dlpack__` (numpy).
Outputs are tensors that the caller allocates; None in their place means "not wanted". All tensors
of a call are on one device; matrices are [..., cols] with adjacent columns and one stride from row
to row, all else is contiguous. `stream` is a cudaStream_t as an int (0: the default stream; ignored
on CPU).
Calls release the GIL, and on CUDA only enqueue.

Raises ValueError for an argument that does not fit (its name, what came, what is supported), for
tensors without memory of their own (FakeTensor, meta), with a negative bit, or beyond 2**48
elements, and for outputs whose elements share memory; TypeError for one that is no tensor,
MemoryError where the CPU has no memory for a call, RuntimeError for an error of the device.
"""

from collections.abc import Callable
from typing import Any

Tensor = Any

def set_num_threads(num_threads: int) -> None:
    """Threads that CPU ops may use from now on, process-wide, the calling thread included: 1 to
    1024."""

def get_num_threads() -> int: ...
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    alibi_slopes: Tensor | None,
    rng_state: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    softcap: float,
    window_left: int,
    window_right: int,
    dropout_p: float,
) -> None:
    """out = dropout(softmax(scores)) v, on the CPU; cc/attention/attention.h has the details.

    q and out [batch, seqlen_q, heads, head_dim], k and v [batch, seqlen_k, heads_k, head_dim], one
    float dtype, adjacent elements in a head and any other strides; lse float32 [batch, heads,
    seqlen_q]. With cu_seqlens (int32 [batch + 1]) q [total_q, heads, head_dim] and so on, lse
    [heads, total_q]; max_seqlen_q and max_seqlen_k are read then only. alibi_slopes float32 [heads]
    or [batch, heads]; rng_state is {seed, offset}, int64 [2].
    """

def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    alibi_slopes: Tensor | None,
    rng_state: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    softcap: float,
    window_left: int,
    window_right: int,
    dropout_p: float,
) -> None:
    """Gradients of attention_forward: writes dq, dk and dv from dout and what forward wrote."""

def dense_activation_forward(
    x: Tensor,
    bias: Tensor | None,
    activation: int,
    pre_act: Tensor | None,
    out: Tensor | None,
    stream: int,
) -> None:
    """pre_act = x + bias; out = activation(pre_act): [..., cols], contiguous, of one dtype.

    Activations are numbered as in cc/fused_dense/fused_dense.h. pre_act or out may be x.
    """

def dense_activation_backward(
    dout: Tensor,
    pre_act: Tensor | None,
    activation: int,
    dx: Tensor | None,
    dbias: Tensor | None,
    allocate: Callable[[int], Tensor],
    stream: int,
) -> None:
    """dx = dout * activation'(pre_act), which may be dout; dbias [cols] its sum over rows.

    `allocate` as for layer_norm_backward.
    """

def dense_matmul_version() -> int:
    """Of cuBLASLt, 10000 * major + 100 * minor + patch; RuntimeError where there is none."""

def dense_matmul_algorithms(
    matmul: int,
    left: Tensor,
    right: Tensor,
    out: Tensor,
    bias: Tensor | None,
    pre_act: Tensor | None,
    dbias: Tensor | None,
    activation: int,
    allow_tf32: bool,
    max_algorithms: int,
) -> list[tuple[bytes, int]]:
    """Ways to compute a product, (the library's bytes, bytes of workspace), the likely best first.

    matmul 0: out = activation(left right^T + bias), left x [..., in], right weight [out, in];
    1: out = (left right) * activation'(pre_act), left dout [..., out], right weight, dbias [in];
    2: out = left^T right, left dout, right x, dbias [out].
    """

def dense_matmul_check(
    matmul: int,
    left: Tensor,
    right: Tensor,
    out: Tensor,
    bias: Tensor | None,
    pre_act: Tensor | None,
    dbias: Tensor | None,
    activation: int,
    allow_tf32: bool,
    algorithm: tuple[bytes, int],
) -> None:
    """RuntimeError if the library does not take the algorithm for this product."""

def dense_matmul(
    matmul: int,
    left: Tensor,
    right: Tensor,
    out: Tensor,
    bias: Tensor | None,
    pre_act: Tensor | None,
    dbias: Tensor | None,
    activation: int,
    allow_tf32: bool,
    algorithm: tuple[bytes, int],
    allocate: Callable[[int], Tensor],
    stream: int,
) -> None:
    """Computes it. `allocate` as for layer_norm_backward."""

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

def rotary(
    x: Tensor,
    out: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None,
    sin_k: Tensor | None,
    num_heads_q: int,
    num_heads_k: int,
    seqlen_offset: int,
    seqlen_offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    position_ids: Tensor | None,
    interleaved: bool,
    conjugate: bool,
    stream: int,
) -> None:
    """Turns the first num_heads_q heads of x by cos and sin, the next num_heads_k by cos_k, sin_k.

    x is [batch, seqlen, (packed,) heads, head_dim], with cu_seqlens [total, (packed,) heads,
    head_dim], of any strides but the last. `out` receives every head; None: in place, and the heads
    after those are not touched. Tables are [positions, rotary_dim / 2], float32 or x's dtype.
    Integers are all int32 or all int64. The details are in cc/rotary/rotary.h.
    """

def adamw_step(
    params: list[Tensor],
    grads: list[Tensor | None],
    masters: list[Tensor | None],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    groups: list[int],
    group_values: list[tuple[float, Tensor | None, float, float, float, float]],
    grad_scale: Tensor | None,
    grad_norm: Tensor | None,
    skip: Tensor | None,
    skipped_steps: Tensor | None,
    max_norm: float,
    table: Tensor | None,
    table_on_host: Tensor | None,
    stream: int,
) -> None:
    """One AdamW step of all parameters whose gradient is not None, in one launch.

    The first six lists hold a parameter's tensors at the same index, all dense and of the
    parameter's strides; `groups` its index into group_values, tuples (lr, lr as a tensor, beta1,
    beta2, eps, weight_decay). Scalars are float32 tensors of one element, skipped_steps is int64.
    `table` and `table_on_host` (zeroed at first; None: written anew each time) are uint8
    [adamw_table_bytes(len(params), len(group_values))]. The details are in cc/adamw/adamw.h.
    """

def adamw_table_bytes(num_tensors: int, num_groups: int) -> int: ...
def grad_norm(
    grads: list[Tensor], norm: Tensor, allocate: Callable[[int], Tensor], stream: int
) -> None:
    """Writes the 2-norm of all elements of all gradients to norm, float32 of one element.

    `allocate(bytes)` is as in layer_norm_backward.
    """

def cross_entropy_forward(
    logits: Tensor,
    labels: Tensor,
    known_lse: Tensor | None,
    label_smoothing: float,
    logit_scale: float,
    lse_square_scale: float,
    ignore_index: int,
    first_class: int,
    num_classes: int,
    partial: bool,
    losses: Tensor,
    lse: Tensor | None,
    z_losses: Tensor | None,
    stream: int,
) -> None:
    """Cross entropy of logits [..., cols] and labels [...], int64 or int32.

    Writes losses, lse and z_losses, float32 [...]. Columns from num_classes - first_class on are
    padding. With known_lse, float32 [...], the log-sum-exp is taken from there. The details are in
    cc/cross_entropy/cross_entropy.h.
    """

def cross_entropy_backward(
    dlosses: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    label_smoothing: float,
    logit_scale: float,
    lse_square_scale: float,
    ignore_index: int,
    first_class: int,
    num_classes: int,
    dlogits: Tensor,
    stream: int,
) -> None:
    """dlogits [..., cols], which may be logits, from dlosses float32 [...], contiguous or stride 0.

    lse is forward's, over all classes.
    """

def cross_entropy_forward_backward(
    logits: Tensor,
    labels: Tensor,
    dlosses: Tensor | None,
    label_smoothing: float,
    logit_scale: float,
    lse_square_scale: float,
    ignore_index: int,
    num_classes: int,
    losses: Tensor,
    z_losses: Tensor | None,
    dlogits: Tensor,
    stream: int,
) -> None:
    """Both in one pass; dlosses None: 1 for each row."""

def scale(x: Tensor, factor: Tensor, y: Tensor, stream: int) -> None:
    """y = factor * x for a factor float32 [] on the device; y has any dtype and may be x."""
