"""What users of other fused norms have reported, held against ours. That rows far from zero are as
exact as torch's is tested beside the op, on GPUs too."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashtrain.ops.layer_norm import dropout_add_layer_norm, layer_norm
from flashtrain.testing import tolerances


@pytest.mark.parametrize("size", [1, 2, 7, 12_288, 12_289, 20_001])
def test_hidden_sizes_that_no_table_lists(size: int) -> None:
    """Dao-AILab/flash-attention#120 and #751: sizes beyond 8k, or no multiple of 8."""
    torch.manual_seed(0)
    inputs = [torch.randn(40, size) + 10.0, torch.randn(size), torch.randn(size)]
    dz = torch.randn(40, size)

    def results(fused: bool, dtype: torch.dtype) -> list[Tensor]:
        x, weight, bias = (t.to(dtype).requires_grad_() for t in inputs)
        if fused:
            z = layer_norm(x, weight, bias, 1e-5)
        else:
            z = F.layer_norm(x, (size,), weight, bias, 1e-5)
        return [z.detach(), *torch.autograd.grad(z, (x, weight, bias), dz.to(dtype))]

    ours, torchs = results(True, torch.float32), results(False, torch.float32)
    for name, mine, other, exact in zip(
        ("z", "dx", "dweight", "dbias"), ours, torchs, results(False, torch.float64)
    ):
        k = tolerances.K_WEIGHT_GRAD if name in ("dweight", "dbias") else tolerances.K_OUTPUT
        tolerances.assert_as_exact_as_torch(name, mine, other, exact, k)


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.arange(24.0).view(6, 4).t(), id="transposed"),
        pytest.param(torch.arange(6.0).expand(4, 6), id="expanded rows"),
        pytest.param(torch.arange(48.0).view(4, 12)[:, ::2], id="every other column"),
        pytest.param(torch.arange(4.0).view(4, 1).expand(4, 6), id="expanded columns"),
        pytest.param(torch.zeros(0, 6), id="no rows"),
    ],
)
def test_inputs_in_any_order_of_memory(x: Tensor) -> None:
    """Dao-AILab/flash-attention#1347: strided inputs; here gradients of stride 0 too."""
    torch.manual_seed(0)
    weight, leaf = torch.randn(6), x.detach().requires_grad_()
    z, total = dropout_add_layer_norm(leaf, leaf, weight, None, 0.0, 1e-5, prenorm=True)
    (gradient,) = torch.autograd.grad(z.sum() + total.sum(), leaf)
    exact = x.double().detach().requires_grad_()
    twice = exact + exact
    right = F.layer_norm(twice, (6,), weight.double(), None, 1e-5).sum() + twice.sum()
    (expected,) = torch.autograd.grad(right, exact)
    torch.testing.assert_close(gradient, expected.float(), rtol=1e-5, atol=1e-4)
