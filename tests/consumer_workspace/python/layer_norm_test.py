"""One op of flashtrain beside the consumer's own packages."""

import sys

import ops
import torch

from flashtrain.ops.layer_norm import dropout_add_layer_norm


def test_own_package_is_not_shadowed() -> None:
    assert ops.OWNER == "consumer"


def test_agrees_with_torch_forward_and_backward() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 48, requires_grad=True)
    weight = torch.randn(48, requires_grad=True)
    bias = torch.randn(48, requires_grad=True)
    residual = torch.randn(7, 48)
    grad = torch.randn(7, 48)

    z = dropout_add_layer_norm(x, residual, weight, bias, dropout_p=0.0, epsilon=1e-5)
    expected = torch.nn.functional.layer_norm(x + residual, (48,), weight, bias, 1e-5)

    torch.testing.assert_close(z, expected)
    for ours, theirs in zip(
        torch.autograd.grad(z, (x, weight, bias), grad),
        torch.autograd.grad(expected, (x, weight, bias), grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_one_op_brings_neither_models_nor_the_trainer() -> None:
    above = {"flashtrain.models", "flashtrain.train", "ml_collections", "absl", "tensorboard"}
    assert not above & set(sys.modules)
