"""Packed weights: where each value lies, what comes back out of every format, and what rounding costs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petalsd import _C
from petalsd.ops.packed_weight import (
    GROUP_INPUTS,
    PackedLayout,
    PackedWeight,
    WeightFormat,
    native_weight,
    unpack_nibbles,
)
from petalsd.ops.weight_packing import pack_rows, pack_stack, pack_weight
from tests.models.test_native_span import TIERS, has_tier
from tests.numeric import assert_close
from tests.quantized_linear import integer_weights, least_error_scales, reference_linear

EXACT = (WeightFormat.FLOAT32, WeightFormat.BFLOAT16)
QUANTIZED = (WeightFormat.INT8, WeightFormat.INT4)
SIZES = st.tuples(st.integers(1, 70), st.integers(1, 200))


def _weight(num_out: int, num_in: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_out, num_in, generator=torch.Generator().manual_seed(seed))


def _exact(weight: torch.Tensor, format: WeightFormat) -> torch.Tensor:
    return weight.bfloat16().float() if format is WeightFormat.BFLOAT16 else weight


@pytest.mark.parametrize("format", EXACT)
@given(SIZES)
@settings(max_examples=30, deadline=None)
def test_float_formats_give_the_weight_back(format: WeightFormat, size: tuple[int, int]) -> None:
    """Nothing is lost but what the format's own rounding takes, for any size."""
    weight = _weight(*size)
    assert torch.equal(pack_weight(weight, format).unpack(torch.float32), _exact(weight, format))


@pytest.mark.parametrize("format", QUANTIZED)
@given(SIZES)
@settings(max_examples=30, deadline=None)
def test_integer_formats_are_near_the_weight(format: WeightFormat, size: tuple[int, int]) -> None:
    """No value is farther off than half a step of int8, and int4 loses no more than a sixth of the weight."""
    weight = _weight(*size)
    error = pack_weight(weight, format).unpack(torch.float32) - weight
    if format is WeightFormat.INT8:
        assert (error.abs() <= weight.abs().amax(dim=1, keepdim=True) / 127 * 0.501).all()
    assert error.norm() <= {WeightFormat.INT8: 0.02, WeightFormat.INT4: 0.16}[format] * weight.norm()


@pytest.mark.parametrize("format", WeightFormat)
@given(SIZES)
@settings(max_examples=20, deadline=None)
def test_padding_is_zero(format: WeightFormat, size: tuple[int, int]) -> None:
    """Kernels read whole tiles: what lies behind the last output and the last input counts for nothing."""
    packed = pack_weight(_weight(*size), format)
    whole = packed.layout
    padded = PackedWeight(format, whole.num_tiles * 16, whole.padded_in, packed.data, packed.scales)
    values = padded.unpack(torch.float32)
    assert not values[size[0] :].any()
    assert not values[:, size[1] :].any()
    assert packed.scales is None or torch.isfinite(packed.scales).all()


def test_the_places_of_float_values() -> None:
    """W[16t+j, k] lies at data[t, k, j] in float32, and at data[t, k // 2, j, k % 2] in bfloat16."""
    weight = torch.arange(40 * 70, dtype=torch.float32).view(40, 70) % 251  # whole in bfloat16
    wide = pack_weight(weight, WeightFormat.FLOAT32).data
    narrow = pack_weight(weight, WeightFormat.BFLOAT16).data
    assert wide.shape == (3, 70, 16)
    assert narrow.shape == (3, 48, 16, 2)
    for output, k in [(0, 0), (5, 3), (16, 69), (39, 1), (31, 68)]:
        assert wide[output // 16, k, output % 16] == weight[output, k]
        assert narrow[output // 16, k // 2, output % 16, k % 2] == weight[output, k]


def test_the_places_of_int8_values() -> None:
    """W[16t+j, k] / scale + 128 lies at data[t, k // 4, j, k % 4], its scale at scales[16t+j]."""
    weight = _weight(40, 70)
    packed = pack_weight(weight, WeightFormat.INT8)
    assert packed.scales is not None
    assert packed.data.shape == (3, 32, 16, 4)
    assert packed.scales.shape == (48,)
    for output, k in [(0, 0), (5, 3), (16, 69), (39, 1), (31, 68)]:
        expected = round(float(weight[output, k] / packed.scales[output])) + 128
        assert packed.data[output // 16, k // 4, output % 16, k % 4] == expected


def test_the_places_of_int4_values() -> None:
    """Of 8 inputs the first four lie in the low halves of a word's bytes, the others in the high halves."""
    weight = _weight(40, 150)
    packed = pack_weight(weight, WeightFormat.INT4)
    assert packed.scales is not None
    assert packed.data.shape == (3, 3, 8, 16, 4)
    assert packed.scales.shape == (3, 3, 16)
    for output, k in [(0, 0), (5, 3), (16, 69), (39, 132), (31, 68), (20, 149)]:
        group, inside = divmod(k, 64)
        byte = int(packed.data[output // 16, group, inside // 8, output % 16, inside % 4])
        scale = float(packed.scales[output // 16, group, output % 16])
        expected = max(0, min(15, round(float(weight[output, k]) / scale) + 8))
        assert (byte >> 4 if inside % 8 >= 4 else byte & 15) == expected


@pytest.mark.parametrize("format", QUANTIZED)
def test_the_oracle_reads_what_unpack_reads(format: WeightFormat) -> None:
    """Two readings of the format, one by words and one by its definition, give the same weight."""
    packed = pack_weight(_weight(40, 150), format)
    whole, scales = integer_weights(packed)
    assert torch.equal((whole * scales[..., None]).flatten(1)[:40, :150], packed.unpack(torch.float32))


def test_the_values_of_a_byte() -> None:
    """Byte b of a word has input b in its low half, and input b + 4 in its high half."""
    packed = torch.tensor([[0x40, 0x51, 0x62, 0x73, 0xC8, 0xD9, 0xEA, 0xFB]], dtype=torch.uint8)
    assert unpack_nibbles(packed).tolist() == [list(range(16))]


@pytest.mark.parametrize("format", WeightFormat)
@pytest.mark.parametrize("magnitude", [1.0, 1e-40, 3e38], ids=["ones", "subnormal", "huge"])
def test_extreme_rows_stay_finite(format: WeightFormat, magnitude: float) -> None:
    """Rows of zeros, of one value, and of values at the ends of float32's range."""
    weight = torch.zeros(3, 130)
    weight[1] = magnitude
    weight[2, 7] = -magnitude
    packed = pack_weight(weight, format)
    values = packed.unpack(torch.float32)
    assert packed.scales is None or (packed.scales != 0).all()
    assert not values[0].any()
    assert_close(values, weight, 1e-37, 0.04, "values")


def test_int4_uses_all_levels_and_beats_plain_rounding() -> None:
    """The choice of scales is better than the largest value at level 7 or at level -8, on normal weights."""
    weight = _weight(64, 640)
    packed = pack_weight(weight, WeightFormat.INT4)
    whole, _ = integer_weights(packed)
    assert (whole.min(), whole.max()) == (-8, 7)
    error = (packed.unpack(torch.float32) - weight).norm()
    groups = weight.view(-1, 64)
    largest = groups.gather(1, groups.abs().argmax(dim=1, keepdim=True))
    for level in (7, -8):
        scale = largest / level
        plain = ((groups / scale).round().clamp(-8, 7) * scale - groups).norm()
        assert error < 0.98 * plain


@pytest.mark.parametrize("tier", TIERS)
def test_every_tier_rounds_to_the_scales_of_least_error(tier: str) -> None:
    """Against the search written down plainly, over groups of normal, heavy-tailed, constant and no values."""
    if not has_tier(tier):
        pytest.skip(f"this processor has no {tier}")
    tails = torch.distributions.StudentT(3.0).sample((40, GROUP_INPUTS))
    values = torch.cat(
        (_weight(200, GROUP_INPUTS), tails, torch.ones(1, GROUP_INPUTS), torch.zeros(1, GROUP_INPUTS))
    )
    packed = PackedWeight.empty(WeightFormat.INT4, *values.shape)
    _C.pack_weight([(values.data_ptr(), "float32", GROUP_INPUTS, len(values))], native_weight(packed), tier)
    whole, scales = integer_weights(packed)
    scales = scales.flatten()[: len(values)]
    expected = least_error_scales(values)
    assert (scales == expected.bfloat16().float()).float().mean() > 0.99  # the order of a sum may decide
    levels = (values / scales[:, None]).round().clamp(-8, 7)
    assert torch.equal(whole.flatten(1)[: len(values)].float(), levels)


@pytest.mark.parametrize("format", WeightFormat)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
def test_parts_are_packed_as_the_whole(format: WeightFormat, heights: list[int]) -> None:
    """Weights one below the other, whatever tiles their borders cut, are what their concatenation is."""
    parts = [_weight(height, 70, seed) for seed, height in enumerate(heights)]
    packed = PackedWeight.empty(format, sum(heights), 70)
    pack_rows(parts, packed)
    whole = pack_weight(torch.cat(parts), format)
    assert torch.equal(packed.data, whole.data)
    assert (packed.scales is None and whole.scales is None) or torch.equal(packed.scales, whole.scales)


@pytest.mark.parametrize("format", WeightFormat)
def test_large_weights_are_packed_in_pieces(format: WeightFormat) -> None:
    """A weight of many pieces equals its slices packed alone, and lies at a cache line."""
    weight = _weight(1000, 1100).bfloat16()
    packed = pack_weight(weight, format)
    assert packed.data.data_ptr() % 64 == 0
    unpacked = packed.unpack(torch.bfloat16)
    assert unpacked.dtype == torch.bfloat16
    for start in (0, 480, 960):
        alone = pack_weight(weight[start : start + 40], format).unpack(torch.bfloat16)
        assert torch.equal(unpacked[start : start + 40], alone)


def _same(one: PackedWeight, other: PackedWeight) -> bool:
    if one.scales is None or other.scales is None:
        return one.scales is other.scales and torch.equal(one.data, other.data)
    return torch.equal(one.data, other.data) and torch.equal(one.scales, other.scales)


@pytest.mark.parametrize("format", WeightFormat)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_any_dtype_are_packed_as_their_values_in_float32(
    dtype: torch.dtype, format: WeightFormat
) -> None:
    """Subnormal numbers of float16 and the ends of its range among them."""
    weight = _weight(40, 1100)
    weight[0, :4] = torch.tensor([6e-8, -3e-5, 65504.0, -65504.0])
    weight = weight.to(dtype)
    assert _same(pack_weight(weight, format), pack_weight(weight.float(), format))


@pytest.mark.parametrize("format", WeightFormat)
def test_rows_may_lie_anywhere(format: WeightFormat) -> None:
    """Columns of a wider matrix, every other row, a transpose, and parts that end within a tile."""
    weight = _weight(60, 200)
    expected = pack_weight(weight, format)
    wide = torch.zeros(120, 300)
    wide[::2, 50:250] = weight
    assert _same(pack_weight(wide[::2, 50:250], format), expected)
    assert _same(pack_weight(weight.t().contiguous().t(), format), expected)
    parts = PackedWeight.empty(format, 60, 200)
    pack_rows([weight[:7], weight[7:7], weight[7:30].double(), weight[30:].clone()], parts)
    assert _same(parts, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", WeightFormat)
def test_unpacking_goes_by_the_formats_definition(format: WeightFormat, dtype: torch.dtype) -> None:
    """Whatever unpacks: the number of threads, and whether it is done in parts, change nothing."""
    packed = pack_weight(_weight(2100, 1030), format)
    if format in QUANTIZED:
        whole, scales = integer_weights(packed)
        expected = (whole * scales[..., None]).flatten(1)[:2100, :1030].to(dtype)
    else:
        expected = _exact(_weight(2100, 1030), format).to(dtype)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(packed.unpack(dtype), expected)
    finally:
        torch.set_num_threads(threads)
    parts = [
        (outputs, values.clone())
        for outputs, values in packed.unpack_parts(dtype, 16 * 40 * packed.layout.padded_in)
    ]
    assert [(outputs.start, outputs.stop) for outputs, _ in parts] == [
        (start, min(start + 640, 2100)) for start in range(0, 2100, 640)
    ]
    assert torch.equal(torch.cat([values for _, values in parts]), expected)


@pytest.mark.parametrize(
    ("format", "bytes_per_value"),
    [("float32", 4), ("bfloat16", 2), ("int8", 1 + 4 / 640), ("int4", 0.5 + 2 / 64)],
)
def test_bytes_of_a_format(format: str, bytes_per_value: float) -> None:
    """The layout knows what a packed weight takes before there is one."""
    layout = PackedLayout(WeightFormat(format), 320, 640)
    packed = pack_weight(_weight(320, 640), layout.format)
    tensors = [packed.data] + ([] if packed.scales is None else [packed.scales])
    assert layout.nbytes == packed.nbytes == sum(tensor.nbytes for tensor in tensors)
    assert layout.nbytes == pytest.approx(320 * 640 * bytes_per_value)


def test_shapes_that_do_not_fit_are_refused() -> None:
    packed = PackedWeight.empty(WeightFormat.INT8, 20, 30)
    with pytest.raises(ValueError, match=r"\[\(20, 31\)\] do not make up \[20, 30\]"):
        pack_rows([torch.zeros(20, 31)], packed)


@pytest.mark.parametrize(
    ("format", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.01), ("int8", 0.02), ("int4", 0.16)]
)
@pytest.mark.parametrize("size", [(40, 150), (16, 64), (5, 3)])
def test_the_reference_product(format: str, tolerance: float, size: tuple[int, int]) -> None:
    """The oracle itself is near the product in float64, as far as the format allows."""
    weight, x = _weight(*size), _weight(6, size[1], seed=1)
    expected = x.double() @ weight.double().t()
    product = reference_linear(x, pack_weight(weight, WeightFormat(format)))
    assert (product - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("format", QUANTIZED)
def test_a_weight_for_another_device_is_packed_here_and_copied_whole(format: WeightFormat) -> None:
    """Packing needs memory of the host; what is copied is what it would have been here."""
    weight, copied = _weight(40, 100), []
    there = PackedWeight.empty(format, 40, 100).to(torch.device("meta"))
    pack_rows([weight[:24], weight[24:]], there, lambda target, source: copied.append((target, source)))
    expected = pack_weight(weight, format)
    assert expected.scales is not None
    assert [target is part for (target, _), part in zip(copied, (there.data, there.scales), strict=True)] == [
        True,
        True,
    ]
    assert torch.equal(copied[0][1], expected.data) and torch.equal(copied[1][1], expected.scales)
    assert there.unpack(torch.float16).device.type == "meta"


@pytest.mark.parametrize("format", WeightFormat)
def test_a_stack_holds_each_weight_as_if_packed_alone(format: WeightFormat) -> None:
    """One below the other, and each can be had as a view."""
    weights = torch.stack([_weight(48, 100, seed) for seed in range(3)])
    stack = pack_stack(weights, format, torch.device("cpu"))
    assert (stack.num_out, stack.num_in) == (144, 100)
    for number, weight in enumerate(weights):
        part, alone = stack.outputs(48 * number, 48 * (number + 1)), pack_weight(weight, format)
        assert torch.equal(part.unpack(torch.float32), alone.unpack(torch.float32))
        assert part.nbytes == alone.nbytes
        assert part.data.untyped_storage().data_ptr() == stack.data.untyped_storage().data_ptr()


@pytest.mark.parametrize(("first", "end"), [(8, 32), (16, 40), (32, 32), (-16, 16), (32, 64)])
def test_outputs_that_are_no_tiles_are_refused(first: int, end: int) -> None:
    with pytest.raises(ValueError, match=f"outputs {first} to {end} of 48 are not tiles of 16"):
        pack_weight(_weight(48, 64), WeightFormat.INT4).outputs(first, end)
