"""Which way a product is computed: measured once on the user's GPU, then remembered.

The first time a product is met, the library's candidates and the plain path run on random operands:
what the library refuses, or computes otherwise than the plain path, is dropped, and the fastest of
the rest, the plain path among them, is kept: in this process, and in a file for later ones,

    ${XDG_CACHE_HOME:-~/.cache}/flashtrain/matmul/<card>_<n>sm_cublaslt<version>_torch<version>.json

which may be deleted at any time. A process takes over what another has stored meanwhile, so that
all processes of a run, and the run when it is continued, compute with the same bits. Nothing is
measured while the stream is being captured in a CUDA graph, nor with FLASHTRAIN_MATMUL_SEARCH=0 in
the environment: then the library's first candidate is taken, unless a choice is known.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import statistics
import threading
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from flashtrain import _kernels, files
from flashtrain.ops.fused_dense import gemm
from flashtrain.ops.fused_dense.gemm import Algorithm, Operands, Product, Results

_CANDIDATES = 16
_FINALISTS = 4  # candidates that are timed again, with the plain path
_ROUNDS = 7
_MAX_ROW_COUNTS = 32  # searches for one layer whose number of rows keeps changing
_FORMAT = 1

_choices: dict[Product, Algorithm | None] = {}  # None: the plain path
_searched: dict[Product, int] = {}  # by the product without its rows
_stores: dict[torch.device, _Store | None] = {}
_lock = threading.RLock()


def choose(product: Product, operands: Operands) -> Algorithm | None:
    """The algorithm for a product that `fits_library`; None for the plain path.

    `operands` are read for their addresses alone.

    Raises:
      ValueError: FLASHTRAIN_MATMUL_SEARCH is neither 0 nor 1.
    """
    if product in _choices:
        return _choices[product]
    with _lock, torch.no_grad(), torch.cuda.device(product.device):
        if product in _choices:
            return _choices[product]
        store = _store_of(product.device)
        if store is None:
            _choices[product] = None
            return None
        known, choice = store.find(product, operands)
        if not known and torch.cuda.is_current_stream_capturing():
            return _first(product, operands)
        if not known:
            choice = _search_or_first(product, operands, store)
        _choices[product] = choice
        return choice


def forget() -> None:
    """Forgets what this process knows; files stay."""
    with _lock:
        _choices.clear()
        _searched.clear()
        _stores.clear()


def _first(product: Product, operands: Operands) -> Algorithm | None:
    if product.activation == gemm.RELU:
        return None  # only measuring shows whether it keeps NaN
    return next(iter(gemm.algorithms(product, operands, 1)), None)


def _search_or_first(product: Product, operands: Operands, store: _Store) -> Algorithm | None:
    any_rows = product._replace(rows=0)
    if not _is_enabled() or _searched.get(any_rows, 0) >= _MAX_ROW_COUNTS:
        return _first(product, operands)
    _searched[any_rows] = _searched.get(any_rows, 0) + 1
    try:
        choice = _search(product)
    except torch.OutOfMemoryError:
        return _first(product, operands)  # another process may have the memory to measure
    return store.add(product, operands, choice)


def _is_enabled() -> bool:
    value = os.environ.get("FLASHTRAIN_MATMUL_SEARCH", "1")
    if value not in ("0", "1"):
        raise ValueError(
            f"FLASHTRAIN_MATMUL_SEARCH={value}; supported: 1 (measure, the default) or 0 (take the "
            "library's first candidate)"
        )
    return value == "1"


# --- Measuring ------------------------------------------------------------------------------------


def _search(product: Product) -> Algorithm | None:
    operands = gemm.sample(product)
    expected = gemm.run_plain(product, operands)
    timed = []
    for algorithm in gemm.algorithms(product, operands, _CANDIDATES):
        with contextlib.suppress(RuntimeError):  # what the library offers it may yet refuse
            timed.append((_milliseconds(product, operands, algorithm), algorithm))
    timed.sort(key=lambda entry: entry[0])
    contenders = [None, *(algorithm for _, algorithm in timed[:_FINALISTS])]
    # By turns, since the card's clock drifts with its load.
    rounds = [[_milliseconds(product, operands, c) for c in contenders] for _ in range(_ROUNDS)]
    times = {c: statistics.median(column) for c, column in zip(contenders, zip(*rounds))}
    return next(
        choice
        for choice in sorted(contenders, key=times.__getitem__)
        if choice is None
        or (
            _agree(gemm.run_fused(product, operands, choice), expected)
            and _keeps_nan(product, operands, choice)
        )
    )


def _milliseconds(product: Product, operands: Operands, algorithm: Algorithm | None) -> float:
    """The device's time for a call, the mean over a few."""

    def run() -> None:
        if algorithm is None:
            gemm.run_plain(product, operands)
        else:
            gemm.run_fused(product, operands, algorithm)

    calls = 4
    run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(200_000)  # 0.1 ms, in which the calls are queued
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def _keeps_nan(product: Product, operands: Operands, algorithm: Algorithm) -> bool:
    """Whether NaN in a row makes a row of NaN: an activation might turn it into 0."""
    if product.activation == gemm.IDENTITY:
        return True
    left = operands.left.clone()
    left[0] = torch.nan
    out = gemm.run_fused(product, operands._replace(left=left), algorithm).out
    return bool(out[0].isnan().all())


def _agree(results: Results, expected: Results) -> bool:
    """Whether every element is finite and within some roundings of the plain path's."""
    return all(value is None or _close(value, other) for value, other in zip(results, expected))


def _close(value: Tensor, expected: Tensor) -> bool:
    """In slices, as float32 copies of whole activations would take much memory."""
    eps = {torch.float32: 2.0**-10, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}[value.dtype]
    scale = (
        torch.linalg.vector_norm(expected, dtype=torch.float32) / max(1, expected.numel()) ** 0.5
    )
    for part, other in zip(value.flatten().split(2**24), expected.flatten().split(2**24)):
        other = other.float()
        if not ((part.float() - other).abs() <= eps * (other.abs() + scale)).all():
            return False
    return True


# --- Remembering ----------------------------------------------------------------------------------


def _store_of(device: torch.device) -> _Store | None:
    """None where there is no cuBLASLt that fits this build."""
    if device not in _stores:
        try:
            version = _kernels.dense_matmul_version()
        except RuntimeError as error:
            warnings.warn(f"fused_dense takes its plain path: {error}", stacklevel=2)
            _stores[device] = None
        else:
            # A slice of a card (MIG) has fewer multiprocessors than the card.
            properties = torch.cuda.get_device_properties(device)
            card = f"{properties.name}_{properties.multi_processor_count}sm"
            name = f"{card}_cublaslt{version}_torch{torch.__version__}.json"
            _stores[device] = _Store(_cache_dir(), re.sub(r"[^A-Za-z0-9._+-]+", "-", name))
    return _stores[device]


def _cache_dir() -> pathlib.Path | None:
    """None where neither the environment nor the system names a home folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # as its specification says
        try:
            base = str(pathlib.Path.home() / ".cache")
        except RuntimeError:
            warnings.warn(
                "no home folder is known; the choice of matmul algorithms is kept for this process "
                "only; XDG_CACHE_HOME names a folder",
                stacklevel=3,
            )
            return None
    return pathlib.Path(base, "flashtrain", "matmul")


class _Store:
    """The choices in a file of a folder: read once, written whole whenever one is added."""

    def __init__(self, folder: pathlib.Path | None, name: str) -> None:
        self._path = None if folder is None else folder / name
        self._entries = self._read()

    def find(self, product: Product, operands: Operands) -> tuple[bool, Algorithm | None]:
        """(whether a usable choice is stored, the choice)."""
        return self._decode(product, operands, self._entries)

    def add(
        self, product: Product, operands: Operands, choice: Algorithm | None
    ) -> Algorithm | None:
        """Stores the choice, unless another process has stored one: returns the one to use."""
        if self._path is None:
            return choice
        try:
            with self._locked(self._path):
                self._entries = self._read()
                known, stored = self._decode(product, operands, self._entries)
                if known:
                    return stored
                self._entries[product.name()] = (
                    None if choice is None else [choice.data.hex(), *choice[1:]]
                )
                text = json.dumps({"format": _FORMAT, "choices": self._entries}, indent=1)
                files.write(self._path, text.encode())
        except OSError as error:
            warnings.warn(
                f"{self._path}: {files.cause(error)}; the choice of matmul algorithms is kept "
                "for this process only; XDG_CACHE_HOME names another folder",
                stacklevel=2,
            )
            self._path = None
        return choice

    @staticmethod
    def _decode(
        product: Product, operands: Operands, entries: dict
    ) -> tuple[bool, Algorithm | None]:
        if product.name() not in entries:
            return False, None
        entry = entries[product.name()]
        if entry is None:
            return True, None
        try:
            data, workspace_bytes, sums = entry
            algorithm = Algorithm(bytes.fromhex(data), int(workspace_bytes), bool(sums))
        except (TypeError, ValueError, OverflowError):
            return False, None
        return gemm.accepts(product, operands, algorithm), algorithm

    def _read(self) -> dict:
        if self._path is None:
            return {}
        try:
            files.check_regular(self._path)
            content = json.loads(self._path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, RecursionError) as error:
            reason = files.cause(error) if isinstance(error, OSError) else error
            warnings.warn(f"{self._path} is ignored: {reason}", stacklevel=2)
            return {}
        choices = content.get("choices") if isinstance(content, dict) else None
        if isinstance(choices, dict) and content.get("format") == _FORMAT:
            return choices
        return {}

    @staticmethod
    @contextlib.contextmanager
    def _locked(path: pathlib.Path) -> Iterator[None]:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as file:
            files.lock(file, wait=True)
            yield
