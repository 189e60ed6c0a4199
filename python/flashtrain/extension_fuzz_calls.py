"""Well-formed arguments of the extension's functions, and what is right, for extension_fuzz."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flashtrain import _kernels
from flashtrain.ops.reference.adamw import adamw_step
from flashtrain.ops.reference.attention import attention
from flashtrain.ops.reference.rotary import apply_rotary_emb
from flashtrain.testing.fuzz import FLOATS, upper_bound

Arguments = dict[str, Any]
Reference = Callable[[Arguments], list[Tensor]]
# The function, its arguments, those that it writes and that are checked, and their right values.
Drawn = tuple[str, Arguments, tuple[str, ...], Reference]


class UncheckedError(Exception):
    """A call that may be right, in a form that the references here do not have."""


def _plain(*conditions: bool) -> None:
    if not all(conditions):
        raise UncheckedError


def _allocate(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8)


def _floats(rng: random.Random, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, rows apart in memory on some calls."""
    if len(shape) > 1 and rng.random() < 0.3:
        return torch.randn(*shape[:-1], shape[-1] + 3).to(dtype)[..., : shape[-1]]
    return torch.randn(shape).to(dtype)


# --- Each op: arguments and reference -------------------------------------------------------------


def _layer_norm(rng: random.Random) -> Drawn:
    rows, cols, dtype = rng.choice((0, 1, 3)), rng.choice((1, 2, 7, 16)), rng.choice(FLOATS)
    weight, bias = (torch.randn(cols) if rng.random() < 0.7 else None for _ in range(2))
    a: Arguments = dict.fromkeys(("residual", "rowscale", "layerscale", "rng_state", "x"))
    a |= {
        "x0": _floats(rng, rows, cols, dtype=dtype), "weight": weight, "bias": bias,
        "dropout_p": 0.0, "epsilon": 0.1, "is_rms_norm": rng.random() < 0.5,
        "zero_centered_weight": False, "z": torch.zeros(rows, cols, dtype=dtype), "mean": None,
        "rstd": None, "dropout_mask": None, "stream": 0,
    }  # fmt: skip

    def forward(a: Arguments) -> list[Tensor]:
        x = a["x0"].double()
        assert a["z"].shape == x.shape
        _plain(a["dropout_p"] == 0)
        if a["residual"] is not None:
            x = x + a["residual"].double()
        for name in ("rowscale", "layerscale"):
            if a[name] is not None:
                x = x * (a[name].double()[:, None] if name == "rowscale" else a[name].double())
        mean = 0 if a["is_rms_norm"] else x.mean(-1, keepdim=True)
        z = (x - mean) * ((x - mean).square().mean(-1, keepdim=True) + a["epsilon"]).rsqrt()
        one = 1.0 if a["zero_centered_weight"] else 0.0
        z = z if a["weight"] is None else z * (a["weight"].double() + one)
        return [z if a["bias"] is None else z + a["bias"].double()]

    if rng.random() < 0.5:
        return "layer_norm_forward", a, ("z",), forward
    x = a.pop("x0").float()
    grads = {f"d{name}": torch.zeros(cols) if a[name] is not None else None for name in ("weight",)}
    dz = torch.randn(rows, cols)
    for name in ("residual", "bias", "z", "epsilon", "dropout_mask"):
        a.pop(name)
    rms = a["is_rms_norm"]
    mean = x.mean(-1)
    variance = (x if rms else x - mean[:, None]).square().mean(-1)
    a |= {
        "dz": dz, "dx": None, "x": x, "x0": None, "mean": None if rms else mean,
        "rstd": (variance + 0.1).rsqrt(), "dx0": torch.zeros(rows, cols), "dresidual": None,
        "dbias": torch.zeros(cols), "dlayerscale": None, "allocate": _allocate,
    } | grads  # fmt: skip

    def backward(a: Arguments) -> list[Tensor]:
        assert a["dz"].shape == a["x"].shape
        return [a["dz"].double().sum(0).to("cpu")]

    return "layer_norm_backward", a, ("dbias",), backward


def _rotary(rng: random.Random) -> Drawn:
    batch, length, heads, half = (rng.choice((1, 2, 3)) for _ in range(4))
    x = _floats(rng, batch, length, heads, 2 * half + rng.choice((0, 2)), dtype=rng.choice(FLOATS))
    num_heads_q = rng.randint(0, heads)
    a: Arguments = dict.fromkeys(("cos_k", "sin_k", "seqlen_offsets", "cu_seqlens", "position_ids"))
    a |= {
        "x": x, "out": torch.zeros_like(x), "cos": _floats(rng, 5, half).clone(),
        "sin": torch.randn(5, half), "num_heads_q": num_heads_q, "num_heads_k": 0,
        "seqlen_offset": rng.randint(0, 5 - length), "interleaved": rng.random() < 0.5,
        "conjugate": False, "stream": 0,
    }  # fmt: skip
    a["sin"] = a["sin"].as_strided(a["sin"].shape, a["cos"].stride())
    if rng.random() < 0.3:
        a["position_ids"] = torch.randint(0, 5, (batch, length))
        a["seqlen_offset"] = 0
    elif rng.random() < 0.4:
        a["seqlen_offsets"] = torch.randint(0, 6 - length, (batch,))
        a["seqlen_offset"] = 0

    def reference(a: Arguments) -> list[Tensor]:
        x = a["x"].double()
        positions = torch.arange(x.shape[1]) + a["seqlen_offset"]
        if a["position_ids"] is not None:
            positions = a["position_ids"].long()
        elif a["seqlen_offsets"] is not None:
            positions = positions + a["seqlen_offsets"][:, None].long()
        positions = positions.expand(x.shape[:2])
        _plain(a["cu_seqlens"] is None)
        assert a["num_heads_q"] + a["num_heads_k"] <= x.shape[2]
        heads = [a["num_heads_q"], a["num_heads_q"] + a["num_heads_k"]]
        q, k, rest = x.tensor_split(heads, 2)
        cos, sin = a["cos"].double(), a["sin"].double() * (-1 if a["conjugate"] else 1)
        cos_k = cos if a["cos_k"] is None else a["cos_k"].double()
        sin_k = sin if a["sin_k"] is None else a["sin_k"].double()
        options = {
            "interleaved": a["interleaved"], "position_ids": positions,
            "compute_dtype": torch.float64,
        }  # fmt: skip
        q = apply_rotary_emb(q, cos, sin, **options)
        return [torch.cat([q, apply_rotary_emb(k, cos_k, sin_k, **options), rest], 2)]

    return "rotary", a, ("out",), reference


def _attention(rng: random.Random) -> Drawn:
    heads_k, dim, dtype = rng.choice((1, 2)), rng.choice((1, 4, 24)), rng.choice(FLOATS)
    heads = heads_k * rng.choice((1, 2))
    length_q, length_k, batch = rng.choice((0, 1, 3)), rng.choice((0, 2, 70)), 2
    q = _floats(rng, batch * length_q, heads, dim, dtype=dtype)
    k, v = (_floats(rng, batch * length_k, heads_k, dim, dtype=dtype) for _ in range(2))
    a: Arguments = {
        "q": q, "k": k, "v": v, "out": torch.zeros_like(q),
        "lse": torch.zeros(heads, len(q)),
        "cu_seqlens_q": torch.tensor([0, length_q, len(q)], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, length_k, len(k)], dtype=torch.int32),
        "alibi_slopes": None, "rng_state": None, "max_seqlen_q": upper_bound(rng, length_q),
        "max_seqlen_k": upper_bound(rng, length_k), "softmax_scale": 0.3, "softcap": 0.0,
        "window_left": rng.choice((-1, 0, 2, 2**63 - 1)),
        "window_right": rng.choice((-1, 0, 2, 2**63 - 1)), "dropout_p": 0.0,
    }  # fmt: skip

    def forward(a: Arguments) -> list[Tensor]:
        _plain(a["softcap"] < 1e5)  # fp32 loses the scores beside larger ones
        bounds = [a[f"cu_seqlens_{side}"].tolist() for side in "qk"]
        for each, side in zip(bounds, "qk"):
            assert each == sorted(each)
            assert each[0] == 0
            assert each[-1] == len(a[side])
        assert len(bounds[0]) == len(bounds[1])
        window = tuple(min(a[f"window_{side}"], 1000) for side in ("left", "right"))
        parts = [a["q"].double()[:0]]
        for i in range(len(bounds[0]) - 1):
            rows, keys = (slice(b[i], b[i + 1]) for b in bounds)
            out, _ = attention(
                a["q"][None, rows], a["k"][None, keys], a["v"][None, keys],
                softmax_scale=a["softmax_scale"], window_size=window, softcap=a["softcap"],
                alibi_slopes=a["alibi_slopes"], compute_dtype=torch.float64,
            )  # fmt: skip
            parts.append(out[0])
        return [torch.cat(parts)]

    if rng.random() < 0.5:
        return "attention_forward", a, ("out",), forward
    _kernels.attention_forward(**a)
    a |= {"dout": torch.randn(q.shape).to(dtype), "dq": torch.zeros_like(q)}
    a |= {"dk": torch.zeros_like(k), "dv": torch.zeros_like(v)}

    def backward(a: Arguments) -> list[Tensor]:
        inputs = {name: a[name].double().requires_grad_() for name in "qkv"}
        out = forward(a | inputs)[0]
        if not out.requires_grad:
            return [torch.zeros_like(value) for value in inputs.values()]
        return list(torch.autograd.grad(out, list(inputs.values()), a["dout"].double()))

    return "attention_backward", a, ("dq", "dk", "dv"), backward


def _activation(x: Tensor, activation: int) -> Tensor:
    return (
        lambda x: x, lambda x: F.gelu(x, approximate="tanh"), F.relu, lambda x: F.relu(x).square(),
    )[activation](x)  # fmt: skip


def _dense(rng: random.Random) -> Drawn:
    rows, cols, dtype = rng.choice((0, 1, 3)), rng.choice((1, 5, 16)), rng.choice(FLOATS)
    a: Arguments = {
        "pre_act": torch.randn(rows, cols).to(dtype), "activation": rng.randrange(4), "stream": 0,
    }  # fmt: skip
    if rng.random() < 0.5:
        a |= {"x": a["pre_act"].clone(), "bias": torch.randn(cols).to(dtype)}
        a["out"] = torch.zeros(rows, cols, dtype=dtype)

        def forward(a: Arguments) -> list[Tensor]:
            assert a["activation"] >= 0
            bias = 0 if a["bias"] is None else a["bias"].double()
            return [_activation(a["x"].double() + bias, a["activation"])]

        return "dense_activation_forward", a, ("out",), forward
    a |= {"dout": torch.randn(rows, cols).to(dtype), "dx": torch.zeros(rows, cols, dtype=dtype)}
    a |= {"dbias": torch.zeros(cols, dtype=dtype), "allocate": _allocate}

    def backward(a: Arguments) -> list[Tensor]:
        assert a["activation"] >= 0
        if a["pre_act"] is None:
            assert a["activation"] == 0
            a["pre_act"] = a["dout"]
        x = a["pre_act"].double().requires_grad_()
        out = _activation(x, a["activation"])
        return [torch.autograd.grad(out, x, a["dout"].double())[0]]

    return "dense_activation_backward", a, ("dx",), backward


def _dense_matmul(rng: random.Random) -> Drawn:
    """Refused on the CPU, after its arguments are read."""
    a: Arguments = {
        "matmul": rng.randrange(3), "left": torch.randn(8, 8), "right": torch.randn(8, 8),
        "out": torch.zeros(8, 8), "bias": None, "pre_act": None, "dbias": None, "activation": 0,
        "allow_tf32": False, "algorithm": (bytes(64), 0), "allocate": _allocate, "stream": 0,
    }  # fmt: skip
    name = rng.choice(("dense_matmul", "dense_matmul_check", "dense_matmul_algorithms"))
    if name != "dense_matmul":
        del a["allocate"], a["stream"]
    if name == "dense_matmul_algorithms":
        del a["algorithm"]
        a["max_algorithms"] = rng.choice((0, 4, -1, 2**31))
    return name, a, ("out",), lambda a: [1 / 0]


def _cross_entropy(rng: random.Random) -> Drawn:
    rows, cols, dtype = rng.choice((0, 1, 3)), rng.choice((2, 7, 16)), rng.choice(FLOATS)
    a: Arguments = {
        "logits": _floats(rng, rows, cols, dtype=dtype),
        "labels": torch.randint(0, cols, (rows,), dtype=rng.choice((torch.int32, torch.int64))),
        "label_smoothing": rng.choice((0.0, 0.2)), "logit_scale": 1.0, "lse_square_scale": 0.0,
        "ignore_index": -100, "first_class": 0, "num_classes": cols, "stream": 0,
    }  # fmt: skip

    def losses(a: Arguments, logits: Tensor) -> Tensor:
        _plain(not a.get("partial"), a.get("known_lse") is None, a["lse_square_scale"] == 0)
        _plain(a.get("first_class", 0) == 0, a["labels"] is not None)
        classes = a["num_classes"]
        return F.cross_entropy(
            logits[:, :classes] * a["logit_scale"], a["labels"].long(), reduction="none",
            ignore_index=a["ignore_index"], label_smoothing=a["label_smoothing"],
        )  # fmt: skip

    kind = rng.randrange(3)
    if kind == 0:
        a |= {"known_lse": None, "partial": False, "losses": torch.zeros(rows), "lse": None}
        a["z_losses"] = None
        name, outputs = "cross_entropy_forward", ("losses",)
        return name, a, outputs, lambda a: [losses(a, a["logits"].double())]
    a |= {"dlosses": torch.randn(rows), "dlogits": torch.zeros(rows, cols, dtype=dtype)}

    def backward(a: Arguments) -> list[Tensor]:
        logits = a["logits"].double().requires_grad_()
        loss = losses(a, logits)
        dlosses = torch.ones(rows) if a["dlosses"] is None else a["dlosses"]
        return [torch.autograd.grad(loss, logits, dlosses.double())[0]]

    if kind == 1:
        a["lse"] = a["logits"].float().logsumexp(-1)
        return "cross_entropy_backward", a, ("dlogits",), backward
    del a["first_class"]
    a |= {"losses": torch.zeros(rows), "z_losses": None}
    return "cross_entropy_forward_backward", a, ("dlogits",), backward


def _adamw(rng: random.Random) -> Drawn:
    """The lists of one parameter each, so that errors name what is in them."""
    shape = [rng.choice((0, 1, 3, 17)) for _ in range(rng.randrange(3))]
    a: Arguments = dict.fromkeys(
        ("master", "grad_scale", "grad_norm", "skip", "skipped_steps", "table", "table_on_host")
    )
    a |= {
        "param": torch.randn(shape), "grad": torch.randn(shape).to(rng.choice(FLOATS)),
        "exp_avg": torch.randn(shape), "exp_avg_sq": torch.rand(shape) + 0.1,
        "step": torch.tensor(2.0), "group": 0, "lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 0.1,
        "weight_decay": 0.1, "max_norm": float("inf"), "stream": 0,
    }  # fmt: skip

    def reference(a: Arguments) -> list[Tensor]:
        for name in ("grad_scale", "grad_norm", "skip", "skipped_steps"):
            _plain(a[name] is None)
        _plain(a["exp_avg"] is not None, a["exp_avg_sq"] is not None)
        state = [a[name].double() for name in ("param", "exp_avg", "exp_avg_sq")]
        if a["grad"] is None:
            return state[:1]
        assert a["grad"].shape == state[0].shape
        param, *_ = adamw_step(
            state[0], a["grad"].double(), state[1], state[2], int(a["step"]) + 1, lr=a["lr"],
            betas=(a["beta1"], a["beta2"]), eps=a["eps"], weight_decay=a["weight_decay"],
        )  # fmt: skip
        return [param]

    return "adamw_step", a, ("param",), reference


def _step(**a: Any) -> None:
    group = (a.pop("lr"), None, *(a.pop(n) for n in ("beta1", "beta2", "eps", "weight_decay")))
    names = ("param", "grad", "master", "exp_avg", "exp_avg_sq", "step", "group")
    a |= {f"{name}s": [a.pop(name)] for name in names}
    _kernels.adamw_step(group_values=[group], **a)


def _set_num_threads(a: Arguments) -> list[Tensor]:
    assert 1 <= a["num_threads"] <= 1024
    return []


def _norm(a: Arguments) -> list[Tensor]:
    norm = torch.zeros(()) if a["grad"] is None else a["grad"].double().square().sum().sqrt()
    return [norm.reshape(a["norm"].shape)]


def _small(rng: random.Random) -> Drawn:
    kind = rng.randrange(4)
    a: Arguments
    if kind == 0:
        a = {"num_threads": rng.choice((0, 1, 1, -1, 2, 1024, 1025, 100_000, 2**32 + 1))}
        return "set_num_threads", a, (), _set_num_threads
    if kind == 1:
        a = {"num_tensors": rng.choice((0, 1, 2**40, -1)), "num_groups": rng.choice((1, 2**62))}
        return "adamw_table_bytes", a, (), lambda a: []
    shape = [rng.choice((0, 1, 3, 17)) for _ in range(rng.randrange(3))]
    x = torch.randn(shape).to(rng.choice(FLOATS))
    if kind == 2:
        a = {"grad": x, "norm": torch.zeros(()), "allocate": _allocate, "stream": 0}
        return "grad_norm", a, ("norm",), _norm
    a = {"x": x, "factor": torch.randn(()), "y": torch.zeros(shape), "stream": 0}
    return "scale", a, ("y",), lambda a: [a["x"].double() * a["factor"].double()]


GROUPS = {
    "layer_norm": _layer_norm, "rotary": _rotary, "attention": _attention, "dense": _dense,
    "dense_matmul": _dense_matmul, "cross_entropy": _cross_entropy, "adamw": _adamw,
    "small": _small,
}  # fmt: skip
# Functions whose arguments are in lists, under the names that errors give them.
WRAPPERS: dict[str, Callable[..., Any]] = {
    "adamw_step": _step,
    "grad_norm": lambda grad, **rest: _kernels.grad_norm(grads=[grad], **rest),
}
