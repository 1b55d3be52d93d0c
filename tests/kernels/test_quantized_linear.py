"""Products over packed weights, against the product with the unpacked ones."""

from __future__ import annotations

import pytest
import torch

from petalsd.ops import unpacked_linear
from petalsd.ops.launching import record_launches
from petalsd.ops.packed_weight import PackedWeight, WeightFormat
from petalsd.ops.quantized_linear import quantized_linear, reference_quantized_linear
from petalsd.ops.split_workspace import SplitWorkspace
from petalsd.ops.weight_packing import pack_weight
from tests.device import DEVICE
from tests.numeric import assert_close

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
QUANTIZED = [WeightFormat.INT8, WeightFormat.INT4]


def workspace(num_multiprocessors: int = 16) -> SplitWorkspace:
    """Partial sums are NaN where nothing has been written."""
    made = SplitWorkspace.allocate(DEVICE, num_multiprocessors)
    made.partials.fill_(float("nan"))
    return made


def weight_of(format: WeightFormat, num_out: int, num_in: int) -> PackedWeight:
    return pack_weight(torch.randn(num_out, num_in, device="cpu") / num_in**0.5, format).to(DEVICE)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize(
    ("rows", "num_out", "num_in", "has_bias"),
    [
        (1, 64, 1024, True),  # one row, split
        (5, 80, 1040, False),  # outputs beyond a tile, inputs that end within a group
        (16, 32, 64, True),  # less than a tile, one group
        (17, 200, 576, True),  # more rows than the smaller tiles, outputs that fill no packed tile
        (33, 128, 192, False),  # tiles for more rows
        (64, 256, 256, True),  # nothing but full tiles
        (65, 144, 128, True),  # unpacked
        (130, 72, 288, False),  # unpacked, with outputs and inputs that are padded
    ],
)
def test_it_is_the_product_with_the_unpacked_weight(
    rows: int, num_out: int, num_in: int, has_bias: bool, format: WeightFormat, dtype: torch.dtype
) -> None:
    """For every tile, split and not, with sizes that fill no tile; a row of NaN stays alone."""
    weight, used = weight_of(format, num_out, num_in), workspace()
    x = torch.randn(rows, num_in).to(dtype)
    bias = torch.randn(num_out).to(dtype) if has_bias else None
    room = torch.full((rows, -(-num_out // 16) * 16), float("nan"), dtype=dtype)
    out = room[:, :num_out]
    if rows > 1:
        x[rows // 2] = float("nan")
    quantized_linear(x, weight, bias, out, used)
    real = [row for row in range(rows) if rows == 1 or row != rows // 2]
    expected = reference_quantized_linear(x, weight, bias)
    tolerance = TOLERANCE[dtype]
    assert_close(out[real], expected[real], tolerance, tolerance, f"{format} product")
    assert room[:, num_out:].isnan().all()
    assert not used.arrivals.any()


@pytest.mark.parametrize("format", QUANTIZED)
def test_split_sums_can_be_made_again_and_again(format: WeightFormat) -> None:
    """The second product in a workspace is the first's, bit for bit: nothing is left behind that counts."""
    weight, used, x = weight_of(format, 64, 2048), workspace(), torch.randn(2, 2048)
    found = []
    with record_launches() as launches:
        for _ in range(2):
            out = torch.empty(2, 64)
            quantized_linear(x, weight, None, out, used)
            found.append(out)
    assert torch.equal(found[0], found[1])
    assert all(one.constants["NUM_SPLITS"] > 1 for one in launches) and len(launches) == 2


def test_what_does_not_fit_is_refused() -> None:
    """Floating-point formats, and an x of another width."""
    used, x, out = workspace(), torch.zeros(1, 64), torch.zeros(1, 16)
    with pytest.raises(ValueError, match="format is float32: it must be int8 or int4"):
        quantized_linear(x, weight_of(WeightFormat.FLOAT32, 16, 64), None, out, used)
    with pytest.raises(ValueError, match=r"x has shape \[1, 64\]: it must be \[any, 128\]"):
        quantized_linear(x, weight_of(WeightFormat.INT8, 16, 128), None, out, used)


@pytest.mark.parametrize("format", QUANTIZED)
def test_a_weight_is_unpacked_part_by_part(format: WeightFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of three tiles, whose last one is smaller; with and without a bias."""
    monkeypatch.setattr(unpacked_linear, "PART_BYTES", 3 * 16 * 128 * 4)
    weight, x, bias = weight_of(format, 16 * 7, 128), torch.randn(70, 128), torch.randn(16 * 7)
    out = torch.full((70, 16 * 7), float("nan"))
    for one in (None, bias):
        quantized_linear(x, weight, one, out, workspace())
        assert_close(out, reference_quantized_linear(x, weight, one), 1e-5, 1e-5, f"{format} product")
