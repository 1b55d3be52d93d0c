"""Products over weights of 16 bits, against torch's in float32."""

from __future__ import annotations

import pytest
import torch

from petalsd.ops.dense_linear import MAX_ROWS, dense_linear
from petalsd.ops.launching import record_launches
from petalsd.ops.split_workspace import SplitWorkspace
from tests.device import DEVICE
from tests.numeric import assert_close


def workspace() -> SplitWorkspace:
    """Partial sums are NaN where nothing has been written."""
    made = SplitWorkspace.allocate(DEVICE, 16)
    made.partials.fill_(float("nan"))
    return made


def weight_of(num_out: int, num_in: int) -> torch.Tensor:
    return (torch.randn(num_out, num_in) / num_in**0.5).half()


@pytest.mark.parametrize(
    ("rows", "num_out", "num_in", "has_bias"),
    [
        (1, 64, 1152, True),  # one row, split, a split with fewer pieces than others
        (5, 80, 1040, False),  # outputs beyond a tile, inputs that end within a piece
        (16, 16, 64, True),  # less than a tile
        (17, 208, 576, True),  # more rows than the smaller tile has
        (MAX_ROWS, 128, 256, False),  # nothing but full tiles
        (MAX_ROWS + 1, 80, 144, True),  # by torch
    ],
)
def test_it_is_the_product(rows: int, num_out: int, num_in: int, has_bias: bool) -> None:
    """For every tile, split and not, with sizes that fill no tile; a row of NaN stays alone."""
    weight, used = weight_of(num_out, num_in), workspace()
    x = torch.randn(rows, num_in).half()
    bias = torch.randn(num_out).half() if has_bias else None
    room = torch.full((rows, num_out + 16), float("nan"), dtype=torch.float16)
    out = room[:, :num_out]
    if rows > 1:
        x[rows // 2] = float("nan")
    dense_linear(x, weight, bias, out, used)
    real = [row for row in range(rows) if rows == 1 or row != rows // 2]
    expected = x.float() @ weight.float().t()
    if bias is not None:
        expected += bias.float()
    assert_close(out[real], expected[real], 2e-3, 2e-3, "dense product")
    assert room[:, num_out:].isnan().all()
    assert not used.arrivals.any()


def test_few_rows_are_one_launch_and_the_same_again() -> None:
    """However the inputs are split: nothing is left behind that counts."""
    weight, used, x = weight_of(64, 4096), workspace(), torch.randn(2, 4096).half()
    found = []
    with record_launches() as launches:
        for _ in range(2):
            out = torch.empty(2, 64, dtype=torch.float16)
            dense_linear(x, weight, None, out, used)
            found.append(out)
    assert torch.equal(found[0], found[1])
    assert [one.constants["NUM_SPLITS"] > 1 for one in launches] == [True, True]


def test_float32_is_not_rounded() -> None:
    """Matrix units would: such products are torch's, of any number of rows."""
    weight, x, out = torch.randn(48, 80), torch.randn(3, 80), torch.empty(3, 48)
    with record_launches() as launches:
        dense_linear(x, weight, None, out, workspace())
    assert_close(out, x @ weight.t(), 1e-5, 1e-5, "product")
    assert launches == []


def test_what_does_not_fit_is_refused() -> None:
    """Another width, and another dtype."""
    x, out = torch.zeros(1, 64).half(), torch.zeros(1, 16).half()
    with pytest.raises(ValueError, match=r"weight has shape \[16, 128\]: it must be \[any, 64\]"):
        dense_linear(x, weight_of(16, 128), None, out, workspace())
    with pytest.raises(ValueError, match=r"out is torch\.float32: it must be torch\.float16"):
        dense_linear(x, weight_of(16, 64), None, out.float(), workspace())
