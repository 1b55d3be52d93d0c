"""A layer over packed weights as a GPU computes it: its own products in place of linear modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from petalsd.models.hf.packing import pack_layer, round_layer
from petalsd.ops.linear import linear
from petalsd.ops.packed_weight import PackedWeight, WeightFormat
from petalsd.ops.quantized_product import QuantizedProduct
from petalsd.ops.split_workspace import SplitWorkspace
from petalsd.ops.weight_packing import pack_weight
from tests.device import DEVICE
from tests.numeric import assert_close

FORMATS = [WeightFormat.INT8, WeightFormat.INT4]
WORKSPACE = SplitWorkspace.allocate(DEVICE, 8)


def product_of(weight: torch.Tensor, format: WeightFormat) -> QuantizedProduct:
    return QuantizedProduct(packed_of(weight, format), WORKSPACE)


def packed_of(weight: torch.Tensor, format: WeightFormat) -> PackedWeight:
    return pack_weight(weight.cpu(), format).to(DEVICE)


@pytest.mark.parametrize("format", FORMATS)
def test_a_layer_is_the_one_with_rounded_weights(format: WeightFormat) -> None:
    """Its linear modules are replaced, and give what they would with the values of their packed weights."""
    layer = nn.Sequential(nn.Linear(96, 160), nn.SiLU(), nn.Linear(160, 48, bias=False)).requires_grad_(False)
    rounded = nn.Sequential(nn.Linear(96, 160), nn.SiLU(), nn.Linear(160, 48, bias=False)).requires_grad_(
        False
    )
    rounded.load_state_dict(layer.state_dict())
    round_layer(rounded, None, format)
    pack_layer(layer, None, lambda weight: product_of(weight, format), lambda experts: experts)
    x = torch.randn(2, 3, 96)
    assert_close(layer(x), rounded(x), 1e-5, 1e-5, format)
    assert not any(isinstance(module, nn.Linear) for module in layer.modules())


@pytest.mark.parametrize("shape", [(64,), (2, 0, 64), (3, 64)], ids=str)
def test_any_shape_of_rows(shape: tuple[int, ...]) -> None:
    """A single row and none, too."""
    packed = packed_of(torch.randn(32, 64), WeightFormat.INT8)
    x = torch.randn(shape)
    assert_close(QuantizedProduct(packed, WORKSPACE).multiply(x), linear(x, packed), 1e-4, 1e-4, "product")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("num_out", "num_in"), [(1, 64), (33, 60)])
def test_any_width(num_out: int, num_in: int, format: WeightFormat) -> None:
    """Rows that do not start where kernels want them: gates of experts have one output."""
    packed = packed_of(torch.randn(num_out, num_in) / num_in**0.5, format)
    x = torch.randn(2, 3, num_in)
    product = QuantizedProduct(packed, WORKSPACE).multiply(x)
    assert_close(product, linear(x, packed), 1e-5, 1e-5, format)


def test_a_gradient_goes_through_the_unpacked_weight() -> None:
    """Kernels have none; the layer can be trained through all the same."""
    packed = packed_of(torch.randn(32, 64), WeightFormat.INT4)
    x = torch.randn(3, 64, requires_grad=True)
    QuantizedProduct(packed, WORKSPACE).multiply(x).sum().backward()
    assert x.grad is not None
    assert_close(x.grad, packed.unpack(torch.float32).sum(0).expand(3, -1), 1e-4, 1e-4, "gradient")
