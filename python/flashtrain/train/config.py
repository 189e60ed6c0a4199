"""The config of a run: plain dataclasses, checked before anything is started.

The sections `trainer` and `optim` belong to this package. `model` and `data` are mappings for the
run's task (task.py), which checks their keys. Of these two, the trainer itself reads only
`data.batch_size`, the largest micro batch; 0, the default, means the largest that fits.
"""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

from flashtrain.errors import UserError, did_you_mean
from flashtrain.errors.ranges import COUNT, POSITIVE, PROBABILITY, SEED, Range, problem, shown

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
SCHEDULES = ("cosine", "linear", "constant", "wsd", "inverse_sqrt")
DEVICES = ("auto", "cpu", "cuda")
STRATEGIES = ("ddp", "zero1", "fsdp2")
REDUCE_DTYPES = ("fp32", "bf16")

_CHOICES = {
    "optim.schedule": SCHEDULES,
    "trainer.precision": PRECISIONS,
    "trainer.device": DEVICES,
    "trainer.strategy": STRATEGIES,
    "trainer.reduce_dtype": REDUCE_DTYPES,
}
# Of numbers whose minimum is not 0, or whose maximum is not that of 64 bits or fp32.
_RANGES = {
    "trainer.max_steps": Range(1, 2**40),  # times the batch: the number of a sample, an int64
    "trainer.global_batch_size": Range(1, 2**22),
    "trainer.batch_ramp_from": Range(0, 2**22),
    "trainer.log_every": COUNT,
    "trainer.keep_checkpoints": COUNT,
    "trainer.max_bad_steps": COUNT,
    "trainer.devices": Range(0, 1024),
    "trainer.sample_tokens": Range(0, 2**31 - 1),
    "trainer.ema_decay": PROBABILITY,
    "trainer.seed": SEED,
    "optim.betas": PROBABILITY,
    "optim.eps": POSITIVE,
    "data.batch_size": Range(0, 2**22),  # 0: the largest that fits, see estimate.py
    "data.seq_len": COUNT,
    "data.seed": SEED,
}
# Of the section `data`, as far as tasks share them.
_DATA_TYPES = {"batch_size": int, "seq_len": int, "seed": int, "path": str, "source": str}

# Keys a run may change when it is continued: none of them alters what a step computes, but for
# `max_steps`, which stretches the schedule of the steps to come and is asked for on purpose.
RESUMABLE_KEYS = frozenset(
    {
        "data.batch_size",
        "trainer.benchmark_every",
        "trainer.benchmarks",
        "trainer.compile",
        "trainer.device",
        "trainer.devices",
        "trainer.eval_every",
        "trainer.keep_best",
        "trainer.keep_checkpoints",
        "trainer.keep_every",
        "trainer.log_every",
        "trainer.max_bad_steps",
        "trainer.max_steps",
        "trainer.sample_tokens",
        "trainer.save_every",
        "trainer.strategy",
    }
)


@dataclasses.dataclass(frozen=True)
class TrainerConfig:
    """How long, on what and how carefully to train."""

    max_steps: int = 1000  # optimizer steps
    global_batch_size: int = 16  # sequences per optimizer step, over all ranks
    eval_every: int = 250  # steps between validations, 0: none; the end of a run always validates
    benchmarks: str = ""  # files of flashtrain.eval: "hellaswag=<file>,lambada=<file>"
    benchmark_every: int = 0  # steps between benchmarks; 0: at the end of the run only
    save_every: int = 250  # steps between checkpoints, 0: none; the end of a run always saves
    keep_checkpoints: int = 2  # the newest ones kept
    keep_best: int = 0  # also those with the lowest validation loss, if it was measured at the save
    keep_every: int = 0  # also those whose step is a multiple of it, for good; 0: none
    log_every: int = 10  # steps between log lines
    device: str = "auto"  # "auto" (GPUs if there are any), "cpu" or "cuda"
    devices: int = 0  # processes on this machine, one per device; 0: every GPU, or one on CPU
    strategy: str = (
        "ddp"  # how ranks share the work and the state, see flashtrain/train/strategy.py
    )
    reduce_dtype: str = "fp32"  # in which ranks sum gradients; bf16 halves the bytes sent
    batch_ramp_from: int = 0  # global batch of the first steps, see batches.py; 0: no ramp
    batch_ramp_steps: int = 0  # steps until the global batch is global_batch_size
    precision: str = "fp32"  # see flashtrain/train/precision.py
    low_precision_weights: bool = False  # keep weights in bf16 or fp16, see precision.py
    grad_clip: float = 1.0  # largest global gradient norm; 0: no clipping
    spike_zscore: float = (
        0.0  # skip steps this many deviations above the mean, see guard.py; 0: off
    )
    max_bad_steps: int = 10  # skipped steps in a row before the run gives up
    ema_decay: float = 0.0  # validate and keep an average of the weights, see ema.py; 0: off
    compile: bool = False  # torch.compile the model
    deterministic: bool = False  # bit-identical repeats on a GPU, at some speed; CPU always is
    seed: int = 1111  # of initial weights and dropout
    sample_tokens: int = 256  # tokens generated after each validation; 0: none


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019) and its learning rate schedule."""

    lr: float = 6e-4
    min_lr: float = 0.0  # where the schedule ends
    warmup_lr: float = 0.0  # where the warm-up starts
    warmup_steps: int = 0
    schedule: str = "cosine"  # see flashtrain/train/schedule.py
    cycle_steps: int = 0  # end of cosine and linear, min_lr from there on; 0: trainer.max_steps
    cooldown_steps: int = 0  # of wsd: the last steps of the run, on which lr falls to min_lr
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1  # on the weights of nn.Linear only
    fused: bool = True  # flashtrain.ops.adamw; off: torch's


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run. Build it with `from_mapping`, which checks it."""

    name: str
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    optim: OptimConfig
    trainer: TrainerConfig

    @classmethod
    def from_mapping(cls, name: str, config: Mapping[str, Mapping[str, Any]]) -> "RunConfig":
        """Builds a run from nested sections. Raises UserError on the first wrong key or value."""
        sections = ("model", "data", "optim", "trainer")
        for section, values in config.items():
            if section not in sections:
                raise UserError(
                    f"config {name}: no section is called {section!r}; "
                    + did_you_mean(section, sections)
                )
            if not isinstance(values, Mapping):
                raise UserError(f"config section {section} must hold keys, got {shown(values)}")
        run = cls(
            name=name,
            model=types.MappingProxyType(dict(config.get("model", {}))),
            data=types.MappingProxyType({"batch_size": 0} | dict(config.get("data", {}))),
            optim=_build(OptimConfig, "optim", config.get("optim", {})),
            trainer=_build(TrainerConfig, "trainer", config.get("trainer", {})),
        )
        _check(run)
        return run

    def to_dict(self) -> dict[str, Any]:
        """Plain nested data that JSON can hold; tuples become lists."""
        return {
            "name": self.name,
            "model": _plain(self.model),
            "data": _plain(self.data),
            "optim": _plain(dataclasses.asdict(self.optim)),
            "trainer": _plain(dataclasses.asdict(self.trainer)),
        }


def contradictions(
    saved: Mapping[str, Any], now: Mapping[str, Any], model_class: type
) -> list[str]:
    """Keys whose values keep a run from continuing a saved one, as "key (checkpoint: x, now: y)".

    Args:
        saved, now: `RunConfig.to_dict()`. Keys in `RESUMABLE_KEYS` may differ.
        model_class: the dataclass of section `model`. A key that the checkpoint does not have
            stands for its default.
    """
    saved_flat, now_flat = _flatten(saved), _flatten(now)
    for section, cls in (
        ("model", model_class),
        ("optim", OptimConfig),
        ("trainer", TrainerConfig),
    ):
        for field in dataclasses.fields(cls):
            key = f"{section}.{field.name}"
            if key in now_flat and field.default is not dataclasses.MISSING:
                saved_flat.setdefault(key, _plain(field.default))

    def shown(flat: Mapping[str, Any], key: str) -> str:
        return repr(flat[key]) if key in flat else "not set"

    return [
        f"{key} (checkpoint: {shown(saved_flat, key)}, now: {shown(now_flat, key)})"
        for key in sorted(saved_flat.keys() | now_flat.keys())
        if key not in RESUMABLE_KEYS
        and key != "name"
        and shown(saved_flat, key) != shown(now_flat, key)
    ]


def _build(cls: type, section: str, values: Mapping[str, Any]) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    built = {}
    for key, value in values.items():
        if key not in fields:
            raise UserError(
                f"config key {section}.{key} does not exist; " + did_you_mean(key, fields)
            )
        built[key] = _coerce(f"{section}.{key}", value, fields[key].default)
    return cls(**built)


def _coerce(key: str, value: Any, default: Any) -> Any:
    """`value` as the type of the field's default; an int may stand for a float."""
    kind = type(default)
    if kind is tuple:
        if not isinstance(value, (tuple, list)) or len(value) != len(default):
            raise UserError(f"config key {key} must be {len(default)} numbers, got {shown(value)}")
        return tuple(_coerce(key, v, d) for v, d in zip(value, default, strict=True))
    _check_value(key, value, kind)
    return kind(value)


def _check_value(key: str, value: Any, kind: type) -> None:
    """Raises UserError where a key's value is of another type or out of range."""
    if wrong := problem(value, kind, _RANGES.get(key)):
        raise UserError(f"config key {key} must {wrong}, got {shown(value)}")
    if key in _CHOICES and value not in _CHOICES[key]:
        raise UserError(
            f"config key {key}: {shown(value)} is not known; {did_you_mean(value, _CHOICES[key])}"
        )


def _check(run: RunConfig) -> None:
    if run.trainer.low_precision_weights:
        _check_low_precision_weights(run)
    for key, kind in _DATA_TYPES.items():
        if key in run.data:
            _check_value(f"data.{key}", run.data[key], kind)


def _check_low_precision_weights(run: RunConfig) -> None:
    for key, value, needed in (
        ("trainer.precision", run.trainer.precision, ("bf16", "fp16")),
        ("optim.fused", run.optim.fused, (True,)),  # it keeps the fp32 copy
        ("trainer.ema_decay", run.trainer.ema_decay, (0.0,)),  # it would average rounded weights
    ):
        if value not in needed:
            raise UserError(
                f"config key trainer.low_precision_weights needs {key} to be "
                f"{' or '.join(map(str, needed))}, got {value}"
            )


def check_size(data: Mapping[str, Any], key: str) -> None:
    """Raises UserError where `data.<key>` is no integer of at least 1."""
    size = data.get(key)
    if wrong := problem(size, int, COUNT):
        wrong = wrong if "at most" in wrong else "be an integer of at least 1"
        raise UserError(f"config key data.{key} must {wrong}, got {shown(size)}")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
