"""layer_norm against its reference: sizes, dtypes, layouts, dropout, by the two-sided rule."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from flashtrain.ops import layer_norm as ln
from flashtrain.ops.layer_norm.cases import (
    BF16,
    FP16,
    FP32,
    WEIGHT_GRADS,
    Case,
    assert_same_numbers,
    check,
    results_and_gradients,
)
from flashtrain.ops.reference import dropout as dropout_reference
from flashtrain.testing import tolerances
from flashtrain.testing.devices import DEVICE, needs_gpu_memory, poisoned_memory
from flashtrain.testing.shapes import COLS, COLS_HUGE, ROWS


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with poisoned_memory():
        yield


# --- Numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("rows", ROWS)
def test_sizes(rows: int, cols: int, rms: bool) -> None:
    residual = FP32 if rows % 2 else BF16
    check(Case(shape=(rows, cols), rms=rms, residual=residual))


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("cols", COLS_HUGE)
def test_huge_hidden_sizes(cols: int, dtype: torch.dtype, rms: bool) -> None:
    check(Case(shape=(5, cols), dtype=dtype, residual=dtype, rms=rms))


@pytest.mark.parametrize("mean", [0.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize("cols", [768, 4096, 12_288, 20_000, 65_536])
def test_rows_far_from_zero(cols: int, mean: float) -> None:
    """Activations whose mean is many standard deviations, of hidden sizes beyond the 8k of
    Dao-AILab/flash-attention#120 and #751: the error of a sum must not grow with the row."""
    for dtype, residual in ((FP32, None), (FP32, FP32), (BF16, FP32), (FP16, None)):
        check(Case((24, cols), dtype, residual, mean=mean))
    check(Case((24, cols), FP32, None, bias=False, rms=True, mean=mean))


_DTYPES = [
    (dtype, residual, weight)
    for dtype in (FP32, FP16, BF16)
    for residual in dict.fromkeys((None, dtype, FP32))
    for weight in dict.fromkeys((dtype, FP32))
]


@pytest.mark.parametrize("prenorm", [False, True], ids=["postnorm", "prenorm"])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize(("dtype", "residual", "weight"), _DTYPES)
def test_dtypes(dtype, residual, weight, rms: bool, prenorm: bool) -> None:
    for cols in (192, 33):
        check(Case((9, cols), dtype, residual, weight, rms=rms, prenorm=prenorm, bias=not rms))


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize(
    ("dropout_p", "rowscale", "layerscale"),
    [c for c in itertools.product((0.0, 0.37), (False, True), (False, True)) if any(c)],
)
@pytest.mark.parametrize("cols", [50, 1024])
def test_dropout_and_scales(dtype, dropout_p, rowscale, layerscale, cols) -> None:
    for residual in (None, dtype, FP32):
        check(
            Case(
                (3, 7, cols),
                dtype,
                residual,
                weight=FP32 if residual is FP32 else dtype,
                dropout_p=dropout_p,
                rowscale=rowscale,
                layerscale=layerscale,
                rms=residual is None,
            )
        )


@pytest.mark.parametrize("prenorm", [False, True], ids=["postnorm", "prenorm"])
def test_residual_in_fp32_without_a_residual(prenorm: bool) -> None:
    check(Case(residual=None, residual_in_fp32=True, prenorm=prenorm))


def test_many_rows() -> None:
    """Sums over rows are long enough to go through every stage of the weight gradients."""
    check(Case((5000, 96), BF16, FP32, BF16))
    check(Case((5000, 96), FP32, FP32, FP32, rms=True))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="about the CPU kernel's order of summation")
def test_very_many_rows() -> None:
    """torch sums them in a tree, whose error does not grow with the rows as a chain's does."""
    check(Case((40_000, 64), FP32, FP32, FP32, rms=True))


def test_large_mean_and_tiny_variance() -> None:
    """E[x^2] - E[x]^2 would lose every digit here."""
    torch.manual_seed(0)
    x = (torch.randn(8, 1024, device=DEVICE) * 1e-2 + 100.0).requires_grad_()
    weight = torch.ones(1024, device=DEVICE)
    z = ln.layer_norm(x, weight, None, 1e-5)
    exact = torch.nn.functional.layer_norm(x.double(), (1024,), eps=1e-5)
    in_torch = torch.nn.functional.layer_norm(x, (1024,), eps=1e-5)
    tolerances.assert_as_exact_as_torch("z", z, in_torch, exact.detach(), 2.0)


def test_directional_derivatives() -> None:
    """gradcheck needs float64, which the kernel has not: differences in float32, one direction."""
    case = Case((6, 40), FP32, FP32, dropout_p=0.25, rowscale=True, layerscale=True)
    inputs = case.inputs()

    def loss(values: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(3)  # the same mask each time
        z, x = case.ours(values)
        return (z * z).sum() + (z * x).sum()

    leaves = [name for name, t in inputs.items() if t.requires_grad]
    grads = torch.autograd.grad(loss(inputs), [inputs[name] for name in leaves])
    for name, grad in zip(leaves, grads):
        direction = torch.randn_like(grad)
        step = 1e-2
        ahead = loss(inputs | {name: inputs[name] + step * direction})
        behind = loss(inputs | {name: inputs[name] - step * direction})
        numeric = ((ahead.double() - behind.double()) / (2 * step)).item()
        assert (grad * direction).sum().item() == pytest.approx(numeric, rel=1e-2, abs=0.1), name


def test_reference_passes_gradcheck() -> None:
    case = Case((3, 5), torch.float64, torch.float64, torch.float64, layerscale=True)
    inputs = case.inputs()
    mask = torch.rand(3, 5, device=DEVICE) > 0.3

    def function(*values: Tensor):
        return case.reference(dict(zip(inputs, values)), torch.float64, mask)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_stay_in_their_rows(value: float) -> None:
    case = Case((4, 100), FP32, FP32)
    inputs = case.inputs()
    with torch.no_grad():
        inputs["x0"][2, 33] = value
    outputs = case.ours(inputs)
    z, x = outputs
    expected_z, expected_x = case.reference(inputs, None, None)
    assert z[2].isnan().all()
    assert expected_z[2].isnan().all()
    torch.testing.assert_close(x, expected_x, equal_nan=True)
    others = [0, 1, 3]
    torch.testing.assert_close(z[others], expected_z[others])
    ours = results_and_gradients(inputs, outputs)
    assert ours["dx0"][others].isfinite().all()
    assert ours["dx0"][2].isnan().all()
    assert ours["dweight"].isnan().all()


def test_zero_rows() -> None:
    for shape in ((0, 64), (2, 0, 64)):
        case = Case(shape, BF16, BF16, dropout_p=0.1, layerscale=True, rowscale=True)
        inputs = case.inputs()
        z, x = case.ours(inputs)
        assert z.shape == shape
        assert x.shape == shape
        grads = results_and_gradients(inputs, (z, x))
        assert grads["dx0"].shape == shape
        for name in WEIGHT_GRADS:
            assert (grads[f"d{name}"] == 0).all()


# --- Shapes and strides ---------------------------------------------------------------------------

_LAYOUTS = {
    "rows apart": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "odd start": lambda t: torch.cat([t[..., :1], t], -1)[..., 1:],
    "columns apart": lambda t: torch.stack([t, t], -1)[..., 0],
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every other row": lambda t: torch.stack([t, t], 1).flatten(0, 1)[::2],
}


@pytest.mark.parametrize("layout", _LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 72), (4, 5, 33)])
def test_layouts_of_inputs_and_gradients(layout: str, shape: tuple[int, ...]) -> None:
    case = Case(shape, BF16, FP32, rowscale=True)
    inputs = case.inputs()
    plain = results_and_gradients(inputs, case.ours(inputs))

    arrange = _LAYOUTS[layout]
    moved = dict(inputs)
    for name in ("x0", "residual"):
        moved[name] = arrange(inputs[name].detach()).requires_grad_()
        assert torch.equal(moved[name], inputs[name])
        assert not moved[name].is_contiguous()
    z, x = case.ours(moved)
    assert z.is_contiguous()
    assert x.is_contiguous()
    # The gradients arrive in the same layout.
    results = results_and_gradients(moved, (arrange(z), arrange(x)))
    assert_same_numbers(results, plain)


def test_expanded_inputs_and_gradients() -> None:
    x0 = torch.randn(1, 64, device=DEVICE).expand(5, 64).requires_grad_()
    weight = torch.ones(64, device=DEVICE, requires_grad=True)
    z, _ = ln.dropout_add_rms_norm(x0, x0.detach(), weight, None, 0.0, 1e-5, prenorm=True)
    expected = torch.nn.functional.rms_norm(x0 + x0.detach(), (64,), weight, 1e-5)
    torch.testing.assert_close(z, expected)
    grads = torch.autograd.grad(z.sum(), (x0, weight))  # the gradient of a sum has stride 0
    torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), (x0, weight)))


def test_one_dimension() -> None:
    check(Case((768,)))


def test_strided_weights() -> None:
    weight = torch.randn(128, device=DEVICE)[::2].requires_grad_()
    x = torch.randn(3, 64, device=DEVICE)
    z = ln.layer_norm(x, weight, weight, 1e-5)
    torch.testing.assert_close(z, torch.nn.functional.layer_norm(x, (64,), weight, weight))


@needs_gpu_memory(40)
def test_more_than_two_to_the_31_elements() -> None:
    rows, cols = 2**31 // 4096 + 3, 4096
    torch.manual_seed(0)
    x0 = torch.randn(rows, cols, device=DEVICE, dtype=BF16).requires_grad_()
    residual = torch.randn(rows, cols, device=DEVICE, dtype=BF16)
    weight = torch.randn(cols, device=DEVICE, requires_grad=True)
    z, _ = ln.dropout_add_layer_norm(x0, residual, weight, None, 0.0, 1e-5, prenorm=True)
    z.backward(residual)
    last = slice(rows - 5, rows)
    few = x0.detach()[last].requires_grad_()
    few_z, _ = ln.dropout_add_layer_norm(few, residual[last], weight, None, 0.0, 1e-5, prenorm=True)
    few_z.backward(residual[last])
    assert_same_numbers({"z": z[last], "dx0": x0.grad[last]}, {"z": few_z, "dx0": few.grad})


# --- Dropout --------------------------------------------------------------------------------------


def test_mask_is_philox_of_the_drawn_state() -> None:
    for shape, p in (((13, 37), 0.3), ((2, 3, 2050), 0.9), ((1, 1), 0.5)):
        x0 = torch.ones(shape, device=DEVICE, dtype=BF16)
        weight = torch.ones(shape[-1], device=DEVICE)
        torch.manual_seed(11)
        _, x, mask = ln.dropout_add_rms_norm(
            x0, None, weight, None, p, 1e-5, prenorm=True, return_dropout_mask=True
        )
        torch.manual_seed(11)
        state = torch.randint(0, 2**62, (2,), dtype=torch.int64, device=DEVICE)
        expected = dropout_reference.dropout_mask(state, x0[..., 0].numel(), shape[-1], p).view(
            shape
        )
        assert mask.dtype == torch.uint8
        assert torch.equal(mask, expected)
        torch.testing.assert_close(x, (mask / (1.0 - p)).to(BF16))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_of_what_is_dropped(p: float) -> None:
    x0 = torch.ones(512, 1024, device=DEVICE)
    weight = torch.ones(1024, device=DEVICE)
    _, mask = ln.dropout_add_layer_norm(x0, None, weight, None, p, 1e-5, return_dropout_mask=True)
    # Five standard deviations of a binomial share.
    assert abs((mask == 0).float().mean().item() - p) < 5 * (p * (1 - p) / mask.numel()) ** 0.5
    assert (mask.float().mean(0) - (1 - p)).abs().max() < 6 * (p * (1 - p) / 512) ** 0.5
    assert (mask.float().mean(1) - (1 - p)).abs().max() < 6 * (p * (1 - p) / 1024) ** 0.5


def test_masks_differ_between_calls_and_repeat_with_the_seed() -> None:
    case = Case((8, 256), dropout_p=0.5)
    inputs = case.inputs()

    def draw() -> Tensor:
        return case.ours(inputs, return_dropout_mask=True)[-1]

    torch.manual_seed(5)
    first, second = draw(), draw()
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(draw(), first)
    assert torch.equal(draw(), second)


@pytest.mark.parametrize(
    "case",
    [
        Case((8, 64), FP32, None),
        Case((8, 64), BF16, BF16),
        Case((8, 64), BF16, FP32, dropout_p=0.5),
    ],
    ids=["plain", "residual", "mask"],
)
def test_the_same_bits_without_autograd(case: Case) -> None:
    """Which spares the call of its function."""
    inputs = case.inputs()
    found = []
    for enabled in (True, False):
        torch.manual_seed(7)
        with torch.set_grad_enabled(enabled):
            found.append(case.ours(inputs, return_dropout_mask=True))
    assert found[0][0].requires_grad
    assert not found[1][0].requires_grad
    for expected, result in zip(*found, strict=True):
        assert torch.equal(result, expected)


def test_mask_without_dropout_is_all_ones() -> None:
    case = Case((4, 16))
    *_, mask = case.ours(case.inputs(), return_dropout_mask=True)
    assert mask.dtype == torch.uint8
    assert mask.shape == (4, 16)
    assert (mask == 1).all()


def test_activation_checkpointing_repeats_the_mask() -> None:
    case = Case((8, 64), FP32, FP32, dropout_p=0.5)
    inputs = case.inputs()

    def run(x0: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        return case.ours(inputs | {"x0": x0, "residual": residual})

    torch.manual_seed(2)
    plain = results_and_gradients(inputs, run(inputs["x0"], inputs["residual"]))
    torch.manual_seed(2)
    outputs = torch.utils.checkpoint.checkpoint(
        run, inputs["x0"], inputs["residual"], use_reentrant=False
    )
    recomputed = results_and_gradients(inputs, outputs)
    for name, value in plain.items():
        assert torch.equal(recomputed[name], value), name
