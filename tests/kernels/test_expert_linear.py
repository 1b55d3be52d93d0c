"""Products with the weights of each token's experts, against torch's in float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from petalsd.ops.expert_linear import (
    block_rows,
    expert_linear,
    quantized_expert_linear,
    reference_expert_linear,
)
from petalsd.ops.expert_order import order_experts
from petalsd.ops.launching import record_launches
from petalsd.ops.packed_weight import PackedWeight, WeightFormat
from petalsd.ops.split_workspace import SplitWorkspace
from petalsd.ops.weight_packing import pack_stack
from tests.device import DEVICE
from tests.numeric import assert_close

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
FORMATS = [None, WeightFormat.INT8, WeightFormat.INT4]


def workspace(num_multiprocessors: int = 16) -> SplitWorkspace:
    """Partial sums are NaN where nothing has been written."""
    made = SplitWorkspace.allocate(DEVICE, num_multiprocessors)
    made.partials.fill_(float("nan"))
    return made


class Experts:
    """Weights in a format, None for the dtype of states, and what they are in float32."""

    def __init__(
        self,
        format: WeightFormat | None,
        num_experts: int,
        num_out: int,
        num_in: int,
        dtype: torch.dtype,
        *,
        has_bias: bool = False,
    ) -> None:
        self.bias = torch.randn(num_experts, num_out) if has_bias else None
        if self.bias is not None and format is None:
            self.bias = self.bias.to(dtype)
        drawn = (torch.randn(num_experts, num_out, num_in) / num_in**0.5).to(dtype)
        self.weight: torch.Tensor | PackedWeight = drawn
        self.values = drawn.float()
        if format is not None:
            self.weight = pack_stack(drawn, format, DEVICE)
            self.values = self.weight.unpack(torch.float32).view_as(drawn)

    def expected(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return reference_expert_linear(x, self.values, self.bias, index)

    def multiply(self, x: torch.Tensor, index: torch.Tensor, used: SplitWorkspace) -> torch.Tensor:
        """Rows of NaN where the kernel writes nothing; nothing is written beside them."""
        num_experts, num_out, _ = self.values.shape
        order = order_experts(index, num_experts, block_rows(len(index), x.dtype))
        room = torch.full((index.numel() + 1, num_out + 16), float("nan"), dtype=x.dtype)
        out = room[:-1, :num_out]
        if isinstance(self.weight, PackedWeight):
            quantized_expert_linear(x, self.weight, self.bias, order, out, used)
        else:
            expert_linear(x, self.weight, self.bias, order, out, used)
        assert room[:, num_out:].isnan().all() and room[-1].isnan().all()
        assert not used.arrivals.any()
        return out


def router(num_experts: int, top_k: int) -> Callable[[int], torch.Tensor]:
    return lambda num_tokens: torch.rand(num_tokens, num_experts).topk(top_k).indices


def same(*experts: int) -> Callable[[int], torch.Tensor]:
    """All tokens on these."""
    return lambda num_tokens: torch.tensor([experts] * num_tokens)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("num_tokens", "choose", "num_experts", "num_out", "num_in", "is_by_pair"),
    [
        (1, router(8, 2), 8, 64, 1152, False),  # a step of one session, split; most experts are idle
        (5, router(6, 2), 6, 80, 272, False),  # outputs beyond a tile, inputs that end within a piece
        (16, router(4, 1), 4, 16, 64, True),  # less than a tile
        (17, same(2, 0), 3, 48, 96, False),  # more than 16 pairs of an expert
        (40, same(1), 2, 128, 128, True),  # more than 32; nothing but full tiles
        (64, router(16, 4), 16, 32, 48, True),
    ],
    ids=["one", "few", "small", "two-blocks", "one-expert", "most"],
)
def test_it_is_each_pairs_product(
    num_tokens: int,
    choose: Callable[[int], torch.Tensor],
    num_experts: int,
    num_out: int,
    num_in: int,
    is_by_pair: bool,
    format: WeightFormat | None,
    dtype: torch.dtype,
) -> None:
    """For all tiles and formats, of a row for each token or for each pair; a row of NaN stays alone."""
    experts, index = Experts(format, num_experts, num_out, num_in, dtype), choose(num_tokens)
    num_rows = index.numel() if is_by_pair else num_tokens
    x = torch.randn(num_rows, num_in).to(dtype)
    if num_rows > 1:
        x[num_rows // 2] = float("nan")
    out = experts.multiply(x, index, workspace())
    expected = experts.expected(x, index)
    real = ~x.isnan().any(dim=1).repeat_interleave(index.numel() // num_rows)
    assert out[~real].isnan().all()
    assert_close(out[real], expected[real], TOLERANCE[dtype], TOLERANCE[dtype], "product")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_out", "num_in"), [(1, 2, 64, 1152), (5, 2, 80, 272), (40, 1, 128, 128)]
)
def test_a_bias_is_added_once(
    num_tokens: int, top_k: int, num_out: int, num_in: int, format: WeightFormat | None, dtype: torch.dtype
) -> None:
    """Each expert's own, also where a sum is split; beside packed weights it is float32."""
    experts = Experts(format, 4, num_out, num_in, dtype, has_bias=True)
    x, index = torch.randn(num_tokens, num_in).to(dtype), router(4, top_k)(num_tokens)
    with record_launches() as launches:
        out = experts.multiply(x, index, workspace())
    assert launches[-1].constants["NUM_SPLITS"] > 1 or num_tokens > 1
    assert_close(out, experts.expected(x, index), TOLERANCE[dtype], TOLERANCE[dtype], "product")


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_does_not_depend_on_others(format: WeightFormat | None) -> None:
    """Bit for bit among as many, whatever they are and wherever it stands; and as near alone as a product is."""
    experts, used = Experts(format, 8, 64, 512, torch.float16), workspace()
    x, index = torch.randn(32, 512).half(), router(8, 2)(32)
    found = experts.multiply(x, index, used)
    others = torch.randn(32, 512).half()
    others[:20] = float("nan")
    others[30] = x[3]
    moved = router(8, 2)(32)
    moved[30] = index[3]
    again = experts.multiply(others, moved, used)
    assert torch.equal(again[60:62], found[6:8])
    alone = experts.multiply(x[3:4], index[3:4], used)
    assert_close(alone, found[6:8], 2e-3, 2e-3, "one row")


@pytest.mark.parametrize("format", FORMATS)
def test_split_sums_can_be_made_again_and_again(format: WeightFormat | None) -> None:
    """The second product in a workspace is the first's, bit for bit, also where blocks are not used."""
    experts, used = Experts(format, 4, 64, 2048, torch.float32), workspace(64)
    x, index = torch.randn(6, 2048), same(2)(6)
    with record_launches() as launches:
        found = [experts.multiply(x, index, used) for _ in range(2)]
    assert torch.equal(*found)
    products = [one for one in launches if "NUM_SPLITS" in one.constants]
    assert [one.constants["NUM_SPLITS"] > 1 for one in products] == [True, True]
    assert_close(found[0], experts.expected(x, index), 1e-5, 1e-5, "product")


def test_what_does_not_fit_is_refused() -> None:
    """Other numbers of experts, rows and inputs, other dtypes, formats and strides."""
    order, used = order_experts(router(4, 2)(3), 4, 16), workspace()
    x, weight, out = torch.zeros(3, 64), torch.zeros(4, 32, 64), torch.zeros(6, 32)
    cases: list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]] = [
        (r"weight has shape \[3, 32, 64\]: it must be \[4, any, any\]", x, weight[1:], out),
        (r"weight is torch\.float32: it must be torch\.float16", x.half(), weight, out.half()),
        (r"weight has strides .*: it must be contiguous", x, torch.zeros(4, 32, 128)[..., :64], out),
        (r"x has shape \[3, 64\]: it must be \[any, 32\]", x, weight[..., :32].contiguous(), out),
        (r"x has 4 rows for 6 pairs: each must be for as many", torch.zeros(4, 64), weight, out),
        (r"x has 0 rows for 6 pairs", x[:0], weight, out),
        (r"out has shape \[5, 32\]: it must be \[6, 32\]", x, weight, out[1:]),
        (r"out is torch\.float16: it must be torch\.float32", x, weight, out.half()),
    ]
    for message, rows, weights, into in cases:
        with pytest.raises(ValueError, match=message):
            expert_linear(rows, weights, None, order, into, used)
    for message, bias in (
        (r"bias has shape \[4, 16\]: it must be \[4, 32\]", torch.zeros(4, 16)),
        (r"bias has strides \[48, 1\]: it must be contiguous", torch.zeros(4, 48)[:, :32]),
    ):
        with pytest.raises(ValueError, match=message):
            expert_linear(x, weight, bias, order, out, used)
    wide = order_experts(router(4, 2)(3), 4, 32)
    with pytest.raises(ValueError, match=r"blocks have 32 rows: one of 16 in torch\.float32"):
        expert_linear(x, weight, None, wide, out, used)


def test_packed_weights_that_do_not_fit_are_refused() -> None:
    """Floating-point formats, and experts whose outputs end within a tile."""
    order, used, x = order_experts(router(4, 2)(3), 4, 16), workspace(), torch.zeros(3, 64)
    with pytest.raises(ValueError, match="format is float32: it must be int8 or int4"):
        packed = pack_stack(torch.zeros(4, 16, 64), WeightFormat.FLOAT32, DEVICE)
        quantized_expert_linear(x, packed, None, order, torch.zeros(6, 16), used)
    for num_out in (96, 72):
        packed = PackedWeight.empty(WeightFormat.INT8, num_out, 64)
        with pytest.raises(
            ValueError, match=f"{num_out} outputs: each of 4 experts must have the same multiple"
        ):
            quantized_expert_linear(x, packed, None, order, torch.zeros(6, num_out // 4), used)
