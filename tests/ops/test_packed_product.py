"""Products over packed weights: the same numbers, the same gradients, and the weight can be had back."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from petalsd.ops.packed_product import OneDnnProduct, QuantizedProduct, can_pack, make_product
from petalsd.ops.packed_weight import WeightFormat
from petalsd.ops.weight_packing import pack_weight
from tests.numeric import assert_close

CPU = torch.device("cpu")
FORMATS = {torch.float32: WeightFormat.FLOAT32, torch.bfloat16: WeightFormat.BFLOAT16}


@pytest.fixture(params=list(FORMATS), ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if not can_pack(FORMATS[request.param]):
        pytest.skip(f"oneDNN computes no {request.param} on this processor")
    return request.param


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (2, 5, 48), (0, 48)], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_and_gradients_are_those_of_torch(
    dtype: torch.dtype, shape: tuple[int, ...], has_bias: bool
) -> None:
    """For rows and sequences, none included, to the rounding of the dtype."""
    weight, x = drawn(80, 48, dtype=dtype), drawn(*shape, dtype=dtype)
    bias = drawn(80, dtype=dtype) if has_bias else None
    packed = OneDnnProduct(weight)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    expected = functional.linear(x, weight, bias)
    with torch.inference_mode():
        assert_close(packed.multiply(x, bias), expected, tolerance, 0.0, "product")
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    (packed.multiply(ours, bias) ** 2).sum().backward()
    (functional.linear(theirs, weight, bias) ** 2).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert_close(ours.grad, theirs.grad, 40 * tolerance, 0.05, "gradient")
    assert torch.equal(packed.unpack(), weight)
    assert (packed.nbytes, packed.shape) == (weight.nbytes, (80, 48))


def test_the_form_follows_the_format() -> None:
    """Nothing is packed where weights are plain tensors; a few bits are quantized, the rest is oneDNN's."""
    weight = drawn(80, 128)
    assert not can_pack(None)
    assert isinstance(make_product(weight, WeightFormat.FLOAT32), OneDnnProduct)
    for format in (WeightFormat.INT8, WeightFormat.INT4):
        product = make_product(weight, format)
        assert can_pack(format)
        assert isinstance(product, QuantizedProduct)
        assert product.nbytes < weight.nbytes / 3
        expected = functional.linear(drawn(3, 128), pack_weight(weight, format).unpack(torch.float32))
        assert_close(product.multiply(drawn(3, 128)), expected, 1e-4, 1e-4, format)
