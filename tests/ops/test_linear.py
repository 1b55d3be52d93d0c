"""The product of every projection: packed weights give what plain ones do, and keep nothing else alive."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from petalsd.ops import linear as linear_module
from petalsd.ops.linear import linear
from petalsd.ops.packed_weight import WeightFormat
from petalsd.ops.weight_packing import pack_weight
from tests.numeric import assert_close
from tests.quantized_linear import reference_linear

DTYPES = [torch.float32, torch.bfloat16]


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("format", WeightFormat)
@pytest.mark.parametrize("shape", [(150,), (1, 150), (8, 150), (100, 150), (2, 5, 150)], ids=str)
def test_a_packed_weight_is_its_unpacked_one(
    shape: tuple[int, ...], format: WeightFormat, has_bias: bool, dtype: torch.dtype
) -> None:
    """For any rows, with and without a bias, in the dtype of the rows."""
    weight = pack_weight(_random(40, 150), format)
    x = _random(*shape, seed=1).to(dtype)
    bias = _random(40, seed=2).to(dtype) if has_bias else None
    product = linear(x, weight, bias)
    assert product.dtype == dtype
    assert_close(product, linear(x, weight.unpack(dtype), bias), 1e-5, 1e-5, format)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 150), (2, 5, 150)], ids=str)
def test_a_product_with_a_gradient_can_be_changed_in_place(shape: tuple[int, ...], has_bias: bool) -> None:
    """As some layers of transformers do to what a linear module returns."""
    x = _random(*shape).requires_grad_()
    weight = pack_weight(_random(40, 150), WeightFormat.INT8)
    product = linear(x, weight, _random(40, seed=2) if has_bias else None)
    product += 1.0
    product.sum().backward()
    assert x.grad is not None
    assert_close(x.grad, weight.unpack(torch.float32).sum(dim=0).expand(shape), 1e-4, 1e-5, "gradient")


@pytest.mark.parametrize("format", WeightFormat)
def test_it_is_near_what_kernels_compute(format: WeightFormat) -> None:
    """Kernels also round the activations; that changes little."""
    weight, x = pack_weight(_random(40, 150), format), _random(6, 150, seed=1)
    expected = linear(x, weight)
    assert (reference_linear(x, weight) - expected).norm() <= 0.012 * expected.norm()


@pytest.mark.parametrize("format", WeightFormat)
def test_the_gradient_is_that_of_the_unpacked_weight(format: WeightFormat) -> None:
    """Through the packed weight, with a bias, for rows of any shape."""
    weight, bias = pack_weight(_random(40, 150), format), _random(40, seed=2)
    grad = _random(2, 5, 40, seed=3)
    x = _random(2, 5, 150, seed=1).requires_grad_()
    linear(x, weight, bias).backward(grad)
    assert x.grad is not None
    assert_close(x.grad, grad @ weight.unpack(torch.float32), 1e-5, 1e-5, "gradient")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", WeightFormat)
def test_a_weight_of_many_parts_multiplies_as_a_whole(
    format: WeightFormat, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, where the last part is smaller."""
    monkeypatch.setattr(linear_module, "_AT_ONCE", 32 * 192)
    weight, bias = pack_weight(_random(200, 150), format), _random(200, seed=2).to(dtype)
    x, grad = _random(9, 150, seed=1).to(dtype).requires_grad_(), _random(9, 200, seed=3).to(dtype)
    product = linear(x, weight, bias)
    product.backward(grad)
    values = weight.unpack(dtype)
    assert x.grad is not None
    assert product.dtype == x.grad.dtype == dtype
    expected = {product: functional.linear(x, values, bias), x.grad: grad.float() @ values.float()}
    tolerance = 1e-6 if dtype == torch.float32 else 0.004  # half a step of bfloat16
    for actual, wanted in expected.items():
        assert (actual - wanted).norm() < tolerance * wanted.norm()


def test_a_graph_keeps_no_unpacked_weights() -> None:
    """Of ten products waiting for their backward pass, autograd saves less than one unpacked weight takes."""
    weights = [pack_weight(_random(64, 64, seed=seed), WeightFormat.INT4) for seed in range(10)]
    saved = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        saved += tensor.nbytes
        return tensor

    states = _random(2, 64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for weight in weights:
            states = linear(states, weight)
        loss = states.sum()
    assert saved < 64 * 64 * 4
    loss.backward()
