"""layer_norm on row subsets: row by row against the fused op's reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashtrain.compat.flash_attn.norm_cases import hold_against_torch
from flashtrain.compat.flash_attn.ops import layer_norm
from flashtrain.compat.flash_attn.ops import rms_norm as compat_rms_norm
from flashtrain.ops.layer_norm.cases import BF16, FP16, FP32
from flashtrain.ops.reference import layer_norm as layer_norm_reference
from flashtrain.testing import tolerances
from flashtrain.testing.devices import DEVICE, poisoned_memory

# The options decide what comes back, a tensor or a tuple, which types cannot say.
ln: Any = layer_norm
rms_norm: Any = compat_rms_norm
reference: Any = layer_norm_reference


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with poisoned_memory():
        yield


# Row numbers for x0 and for z, R = 7. None: all rows.
_SUBSETS = {
    "both": ([0, 2, 1, 0, 4, 3, 0], [1, 0, 2, 3, 0, 0, 4]),
    "x0": ([3, 0, 1, 2, 0, 0, 5], None),
    "out": (None, [0, 1, 0, 0, 2, 3, 0]),
    "neither": (None, None),
    "none": ([0] * 7, [0] * 7),
}


def _numbers(values: list[int] | None, dtype: torch.dtype = torch.int32) -> Any:
    return None if values is None else torch.tensor(values, dtype=dtype, device=DEVICE)


def _subset_by_loop(
    leaves, x0_subset, out_subset, out_rows, rowscale_const, options, keep_mask, compute_dtype
) -> list[Tensor]:
    """z and x row by row, each row by the reference of the fused op."""
    x0, residual = leaves["x0"], leaves.get("residual")
    z_rows: list[Tensor | None] = [None] * out_rows
    x_rows = []
    for row in range(7):
        source = row if x0_subset is None else x0_subset[row] - 1
        one = x0[source : source + 1] if source >= 0 else x0[:1] * 0.0
        mask = None
        if keep_mask is not None:
            mask = keep_mask[source : source + 1] if source >= 0 else torch.ones_like(one)
        z, x, _ = reference.add_norm(
            one,
            None if residual is None else residual[row : row + 1],
            leaves["weight"],
            leaves.get("bias"),
            epsilon=1e-5,
            keep_mask=mask,
            rowscale=torch.full((1,), rowscale_const, device=DEVICE, dtype=x0.dtype),
            layerscale=leaves.get("layerscale"),
            compute_dtype=compute_dtype,
            **options,
        )
        x_rows.append(x)
        target = row if out_subset is None else out_subset[row] - 1
        if target >= 0:
            z_rows[target] = z
    z = torch.cat(z_rows) if z_rows else x_rows[0][:0].to(compute_dtype or x0.dtype)
    return [z, torch.cat(x_rows)]


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.37])
@pytest.mark.parametrize(
    ("dtype", "residual"), [(FP32, FP32), (BF16, BF16), (BF16, FP32), (FP16, None)]
)
@pytest.mark.parametrize("name", _SUBSETS)
def test_subsets(name: str, dtype, residual, dropout_p: float, rms: bool) -> None:
    x0_subset, out_subset = _SUBSETS[name]
    x0_rows = 7 if x0_subset is None else 5
    out_rows = 7 if out_subset is None else max(out_subset)
    shapes = {"x0": ((x0_rows, 24), dtype), "weight": ((24,), FP32)}
    if residual is not None:
        shapes["residual"] = ((7, 24), residual)
        shapes["layerscale"] = ((24,), FP32)
    if not rms:
        shapes["bias"] = ((24,), FP32)
    function = rms_norm.dropout_add_rms_norm_subset if rms else ln.dropout_add_layer_norm_subset
    options = {"dropout_p": dropout_p, "is_rms_norm": rms}

    def run(leaves):
        z, x, mask = function(
            leaves["x0"], leaves.get("residual"), leaves["weight"], leaves.get("bias"), dropout_p,
            1e-5, layerscale=leaves.get("layerscale"), x0_subset=_numbers(x0_subset),
            out_subset=_numbers(out_subset), rowscale_const=1.5, out_numrows=out_rows,
            prenorm=True, return_dropout_mask=True,
        )  # fmt: skip
        assert mask.shape == leaves["x0"].shape
        assert mask.dtype == torch.uint8
        assert bool((mask == 0).any()) == (dropout_p > 0.0)
        keep = mask if dropout_p > 0.0 else None

        def expression(values, compute_dtype):
            return _subset_by_loop(
                values, x0_subset, out_subset, out_rows, 1.5, options, keep, compute_dtype
            )

        return [z, x], expression

    k = tolerances.K_DROPOUT if dropout_p > 0.0 else tolerances.K_OUTPUT
    hold_against_torch(shapes, run, k)


def test_subset_shapes_follow_x0_but_for_its_first_dimension() -> None:
    x0 = torch.randn(2, 3, 8, device=DEVICE)
    residual = torch.randn(12, 8, device=DEVICE)
    numbers = _numbers([1, 2, 3, 0, 0, 0, 4, 5, 6, 0, 0, 0])
    ones = torch.ones(8, device=DEVICE)
    z, x = ln.dropout_add_layer_norm_subset(
        x0, residual, ones, None, 0.0, 1e-5, x0_subset=numbers.view(4, 3), out_subset=numbers,
        out_numrows=6, prenorm=True,
    )  # fmt: skip
    assert z.shape == (2, 3, 8)
    assert x.shape == (4, 3, 8)
    with pytest.raises(ValueError, match=r"x0_subset: gives 8 rows; supported: a multiple of 3"):
        ln.dropout_add_layer_norm_subset(
            x0, None, ones, None, 0.0, 1e-5, x0_subset=numbers[:8], prenorm=True,
            out_subset=numbers[:8].clamp(max=3).mul(numbers[:8] < 4), out_numrows=3,
        )  # fmt: skip


def test_nan_in_a_row_without_z_stays_out_of_the_weightgradients_of() -> None:
    x0 = torch.randn(3, 8, device=DEVICE)
    x0[1] = float("nan")
    weight = torch.ones(8, device=DEVICE, requires_grad=True)
    z = ln.dropout_add_layer_norm_subset(
        x0, None, weight, None, 0.0, 1e-5, out_subset=_numbers([1, 0, 2]), out_numrows=2
    )
    z.sum().backward()
    assert z.isfinite().all()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x0_subset": [1, 2, 9]}, "x0_subset: got numbers from 1 to 9; supported: 0 to 2"),
        ({"x0_subset": [-1, 2, 1]}, "x0_subset: got numbers from -1 to 2; supported: 0 to 2"),
        ({"x0_subset": [2, 2, 1]}, "x0_subset: got 2 more than once"),
        ({"x0_subset": [2, 1]}, "x0_subset: got 2 elements; supported: 3"),
        ({"x0_subset": 1.0}, "x0_subset: got float"),
        ({"out_subset": [1, 0, 4]}, "out_subset: got numbers from 0 to 4; supported: 0 to 2"),
        ({"out_subset": [1, 0, 0]}, "out_numrows: got 2; supported: 1, as out_subset numbers"),
        ({"out_numrows": -1}, "out_numrows: got -1"),
        ({"rowscale_const": None}, "rowscale_const: got NoneType; supported: float or int"),
        ({"residual": torch.zeros(3, 5)}, r"residual: got shape \[3, 5\]; supported: \[..., 4\]"),
        ({"residual": torch.zeros(2, 4)}, "x0_subset: got 3 elements; supported: 2"),
        ({"weight": torch.zeros(3)}, r"weight: got shape \[3\]"),
    ],
)
@pytest.mark.skipif(DEVICE.type != "cpu", reason="CUDA does not look at the numbers")
def test_subset_errors(changes: dict, message: str) -> None:
    arguments: dict = {
        "x0": torch.zeros(2, 4), "residual": torch.zeros(3, 4), "weight": torch.ones(4),
        "bias": None, "dropout_p": 0.0, "epsilon": 1e-5, "x0_subset": [0, 1, 2],
        "out_subset": [2, 0, 1], "out_numrows": 2,
    }  # fmt: skip
    arguments |= changes
    for name in ("x0_subset", "out_subset"):
        if isinstance(arguments[name], list):
            arguments[name] = _numbers(arguments[name])
    with pytest.raises((ValueError, TypeError), match=message):
        ln.dropout_add_layer_norm_subset(**arguments)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="the CPU refuses such numbers")
def test_on_cuda_a_number_out_of_range_counts_as_0() -> None:
    x0 = torch.randn(2, 8, device=DEVICE)
    ones = torch.ones(8, device=DEVICE)

    def run(numbers: list[int]) -> Tensor:
        return ln.dropout_add_layer_norm_subset(
            x0, None, ones, None, 0.0, 1e-5, x0_subset=_numbers(numbers), prenorm=True
        )[1]

    assert torch.equal(run([1, 99, -3, 2]), run([1, 0, 0, 2]))
