"""The extension module as a file and as an import: what it exports, needs and refuses."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flashtrain import _kernels

_SHT_DYNAMIC, _SHT_DYNSYM, _DT_NEEDED, _SHN_UNDEF = 6, 11, 1, 0


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """Of every run: in one of a thousand draws a row has so little spread that fp32 loses it."""
    torch.manual_seed(0)
    np.random.seed(0)


class _Elf:
    """What a 64-bit little-endian shared object imports and exports (System V ABI, chapter 4)."""

    def __init__(self, path: str) -> None:
        with open(path, "rb") as file:
            self._image = file.read()
        assert self._image[:6] == b"\x7fELF\x02\x01", "not a 64-bit little-endian ELF file"
        (table,) = struct.unpack_from("<Q", self._image, 0x28)
        size, count = struct.unpack_from("<HH", self._image, 0x3A)
        # name, type, flags, address, offset, size, link, info, alignment, entry size
        self._sections = [
            struct.unpack_from("<IIQQQQIIQQ", self._image, table + i * size) for i in range(count)
        ]

    def _entries(self, section_type: int, layout: str) -> list[tuple[int, ...]]:
        section = next(s for s in self._sections if s[1] == section_type)
        self._strings = self._sections[section[6]][4]
        data = self._image[section[4] : section[4] + section[5]]
        return list(struct.iter_unpack(layout, data))

    def _string(self, index: int) -> str:
        start = self._strings + index
        return self._image[start : self._image.index(b"\0", start)].decode()

    def needed(self) -> list[str]:
        """File names of the libraries that the loader must find."""
        entries = self._entries(_SHT_DYNAMIC, "<QQ")
        return [self._string(value) for tag, value in entries if tag == _DT_NEEDED]

    def exported(self) -> list[str]:
        """Symbols that are defined here and that others can bind to."""
        # name, info, other, section, value, size
        entries = self._entries(_SHT_DYNSYM, "<IBBHQQ")
        return [self._string(e[0]) for e in entries if e[3] != _SHN_UNDEF and e[1] >> 4 != 0]


def test_exports_only_its_init_symbol() -> None:
    assert _Elf(_kernels.__file__).exported() == ["PyInit__kernels"]


def test_needs_neither_torch_nor_cuda() -> None:
    needed = _Elf(_kernels.__file__).needed()
    assert needed, "a shared object without any dependency was not read rightly"
    foreign = [
        n for n in needed if any(s in n for s in ("torch", "c10", "cuda", "cublas", "cudnn"))
    ]
    assert foreign == []


def _run_clean(program: str) -> str:
    """Output of a new process that has this one's import path and sees no GPU."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_imports_and_computes_without_torch() -> None:
    program = """
import sys
import numpy as np
from flashtrain import _kernels
x, z = np.array([[1.0, 2.0, 3.0, 6.0]], np.float32), np.full((1, 4), np.nan, np.float32)
_kernels.layer_norm_forward(x, None, None, None, None, None, None, 0.0, 0.0, False, False,
                            z, None, None, None, None, 0)
assert "torch" not in sys.modules
print(np.allclose(z, (x - 3) / np.sqrt(3.5)))
"""
    assert _run_clean(program) == "True"


def test_import_of_the_package_is_light() -> None:
    program = "import sys, flashtrain; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert _run_clean(program) == "False False"


def _forward(x0: object, z: object, **changes: object) -> None:
    arguments: dict[str, Any] = dict.fromkeys(
        ("residual", "weight", "bias", "rowscale", "layerscale", "rng_state", "x", "mean", "rstd")
    )
    arguments |= {
        "x0": x0, "z": z, "dropout_p": 0.0, "epsilon": 1e-5, "is_rms_norm": False,
        "zero_centered_weight": False, "dropout_mask": None, "stream": 0,
    }  # fmt: skip
    _kernels.layer_norm_forward(**(arguments | changes))


@pytest.mark.parametrize(
    "form",
    [lambda t: t, torch.utils.dlpack.to_dlpack, lambda t: t.__dlpack__(), lambda t: t.numpy()],
    ids=["tensor", "capsule", "versioned_or_not_capsule", "numpy"],
)
def test_every_form_of_dlpack(form) -> None:
    x, z = torch.randn(3, 5), torch.full((3, 5), float("nan"))
    _forward(form(x), form(z))
    torch.testing.assert_close(z, torch.nn.functional.layer_norm(x, (5,)))


@pytest.mark.parametrize("by_capsule", [False, True])
def test_takes_tensors_that_require_grad_and_leading_dimensions(by_capsule: bool) -> None:
    if not by_capsule and not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch has no C interface to DLPack")
    form = torch.utils.dlpack.to_dlpack if by_capsule else lambda t: t
    x, z = torch.randn(2, 3, 5, requires_grad=True), torch.full((2, 3, 5), float("nan"))
    _forward(form(x), z)
    torch.testing.assert_close(z, torch.nn.functional.layer_norm(x, (5,)).detach())


def test_row_strides_are_followed() -> None:
    x, z = torch.randn(2, 3, 9)[..., 2:7], torch.full((2, 3, 8), float("nan"))
    _forward(x, z[..., :5])
    torch.testing.assert_close(z[..., :5], torch.nn.functional.layer_norm(x, (5,)))
    assert z[..., 5:].isnan().all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x0": 3}, TypeError, "x0: got int; supported: a tensor"),
        ({"x0": torch.zeros(2, 4).double()}, ValueError, "x0: got dtype float64; supported: float"),
        ({"x0": torch.zeros(2, 4).cfloat()}, ValueError, "x0: got dtype complex64; supported"),
        ({"x0": torch.zeros(2, 4).long()}, ValueError, r"x0: got int64 \[2, 4\].*supported: dtype"),
        ({"x0": torch.zeros(())}, ValueError, "x0: got float32 .*supported: at least one dimen"),
        ({"x0": torch.zeros(4, 2).t()}, ValueError, "x0: got .*strides.*supported: adjacent"),
        ({"x0": torch.zeros(2, 9, 4)[:, ::3]}, ValueError, "z: got .*supported: shape"),
        ({"x0": torch.zeros(2, 0), "z": torch.zeros(2, 0)}, ValueError, "cols is 0"),
        ({"z": None}, ValueError, "z"),
        ({"z": torch.zeros(2, 5)}, ValueError, r"z: got .*\[2, 5\].*supported: shape \[2, 4\]"),
        ({"residual": torch.zeros(4)}, ValueError, r"residual: got .*supported: shape \[2, 4\]"),
        ({"residual": torch.zeros(2, 4).half(), "x": torch.zeros(2, 4)}, ValueError, "x: got"),
        ({"weight": torch.zeros(5)}, ValueError, r"weight: got .*\[5\].*supported: shape \[4\]"),
        ({"weight": torch.zeros(8)[::2]}, ValueError, "weight: got .*supported: a contiguous"),
        (
            {"weight": torch.zeros(4), "bias": torch.zeros(4).half()},
            ValueError,
            "bias: got float16 .*supported: dtype float32",
        ),
        ({"rstd": torch.zeros(2).half()}, ValueError, "rstd: got float16 .*supported: dtype float"),
        ({"mean": torch.zeros(3)}, ValueError, r"mean: got .*supported: shape \[2\]"),
        ({"rng_state": torch.zeros(2)}, ValueError, "rng_state: got float32 .*supported: dtype"),
        ({"dropout_mask": torch.zeros(2, 4)}, ValueError, "dropout_mask: got .*dtype uint8"),
        ({"dropout_p": 0.5}, ValueError, "rng_state"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p"),
        ({"epsilon": -1.0}, ValueError, "epsilon"),
    ],
)
def test_errors_name_the_argument(changes, error, message) -> None:
    arguments = {"x0": torch.zeros(2, 4), "z": torch.zeros(2, 4)} | changes
    with pytest.raises(error, match=message):
        _forward(**arguments)


def test_a_consumed_capsule_is_refused() -> None:
    capsule = torch.utils.dlpack.to_dlpack(torch.zeros(2, 4))
    torch.from_dlpack(capsule)
    with pytest.raises(ValueError, match=r"x0: the DLPack capsule .*consumed"):
        _forward(capsule, torch.zeros(2, 4))


def test_strides_that_do_not_collapse_are_refused() -> None:
    x0 = torch.zeros(2, 9, 4)[:, ::2]
    with pytest.raises(ValueError, match=r"x0: got .*supported: one stride from row to row"):
        _forward(x0, torch.zeros(2, 5, 4))


def test_number_of_threads() -> None:
    before = _kernels.get_num_threads()
    _kernels.set_num_threads(1)
    assert _kernels.get_num_threads() == 1
    _kernels.set_num_threads(before)


def test_numpy_views_keep_their_strides() -> None:
    x, z = np.random.randn(6, 4).astype(np.float32)[::2], np.empty((3, 4), np.float32)
    _forward(x, z)
    expected = torch.nn.functional.layer_norm(torch.from_numpy(x.copy()), (4,))
    np.testing.assert_allclose(z, expected.numpy(), atol=1e-6)


def _fake(x: torch.Tensor) -> torch.Tensor:
    return FakeTensorMode().from_tensor(x)


def _freed(x: torch.Tensor) -> torch.Tensor:
    x.untyped_storage().resize_(0)
    return x


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch._neg_view(torch.ones(2, 4)), r"a negative bit; supported: x0.resolve_neg\("),
        (lambda: torch.ones(2, 4, dtype=torch.cfloat).conj().imag, "a negative bit"),
        (lambda: _fake(torch.ones(2, 4)), "FakeTensor, a subclass that has no memory"),
        (lambda: torch.ones(2, 4, device="meta"), "cannot be read as a tensor with memory"),
        (lambda: torch.ones(2, 4).to_sparse(), "cannot be read as a tensor with memory"),
        (lambda: _freed(torch.ones(2, 4)), r"supported: a tensor with memory"),
        (lambda: _freed(torch.ones(3, 4)[1:]), r"supported: a tensor with memory"),
        (lambda: torch.empty(2**30, 0, 2**20), r"supported: sizes of at most 2\*\*48 elements"),
        (lambda: torch.ones(1, 1).expand(2**31, 2**31), "supported: sizes of at most"),
        (lambda: np.zeros(9, np.uint8)[1:].view(np.float32), "multiples of"),
    ],
)
def test_tensors_that_cannot_be_read(make, message) -> None:
    with pytest.raises(ValueError, match=rf"x0: .*{message}"):
        _forward(make(), torch.zeros(2, 4))


@pytest.mark.parametrize("count", [0, -1, 1025, 100_000, 2**32 + 1])
def test_numbers_of_threads_that_are_refused(count: int) -> None:
    before = _kernels.get_num_threads()
    with pytest.raises(ValueError, match=rf"num_threads: got {count}; supported: 1 to 1024"):
        _kernels.set_num_threads(count)
    assert _kernels.get_num_threads() == before


@pytest.mark.parametrize("activation", [-1, 4, 256, 2**32, 2**63 - 1])
def test_activations_that_are_refused(activation: int) -> None:
    x, out = torch.ones(2, 4), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=f"activation: got {activation}; supported: 0, 1, 2, 3"):
        _kernels.dense_activation_forward(x, None, activation, None, out, 0)
    with pytest.raises(ValueError, match=f"activation: got {activation}; supported: 0, 1, 2, 3"):
        _kernels.dense_activation_backward(x, x, activation, out, None, torch.empty, 0)
    if activation != -1:
        with pytest.raises(ValueError, match=f"matmul: got {activation}; supported: 0, 1, 2"):
            _kernels.dense_matmul_algorithms(
                activation, x, x, out, None, None, None, 0, False, max_algorithms=1
            )


@pytest.mark.parametrize("number", [np.float32(1.7), torch.tensor(1.7), 1.7])
def test_integers_are_not_cut_off(number) -> None:
    with pytest.raises(TypeError, match="activation"):
        _kernels.dense_activation_forward(
            torch.ones(2, 4), None, number, None, torch.zeros(2, 4), 0
        )


def test_outputs_that_overlap_are_refused() -> None:
    q, cu_seqlens = torch.randn(4, 2, 8), torch.tensor([0, 4], dtype=torch.int32)
    out = torch.zeros(4, 1, 8).expand(4, 2, 8)
    with pytest.raises(ValueError, match=r"out: got .*supported: elements that share no memory"):
        _kernels.attention_forward(
            q, q, q, out, torch.zeros(2, 4), cu_seqlens, cu_seqlens, None, None, 4, 4, 1.0, 0.0,
            -1, -1, 0.0,
        )  # fmt: skip


def test_lists_that_change_during_the_call() -> None:
    """The parameters' memory outlives the lists that held it: other threads may clear them."""
    lists = [[torch.ones(3)] for _ in range(5)]
    params, grads, exp_avgs, exp_avg_sqs, _ = lists

    class Clearing:
        """Clears all lists when it is read."""

        def __dlpack__(self) -> object:
            for each in lists:
                each.clear()
            return torch.utils.dlpack.to_dlpack(torch.ones(()))

    _kernels.adamw_step(
        params, grads, [None], exp_avgs, exp_avg_sqs, [Clearing()], [0],
        [(0.1, None, 0.9, 0.99, 1e-8, 0.0)], None, None, None, None, float("inf"), None, None, 0,
    )  # fmt: skip
