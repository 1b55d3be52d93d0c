"""Head norms, rotation and KV write in one kernel, against transformers' rotation and the plain reference."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as rotate_interleaved
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate_halves

from petalsd.ops.eight_bit_kv import Float8KV
from petalsd.ops.ragged import PagedKV
from petalsd.ops.rope_kv import HeadNorms, Rotation, reference_rope_and_write, rope_and_write
from tests.device import DEVICE
from tests.numeric import assert_close

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
NAN = float("nan")
PAGES, PAGE_TOKENS, MAX_POSITIONS, BLOCK = 12, 4, 64, 3


@dataclass(frozen=True)
class Case:
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    rotary: int = 64
    interleaved: bool = False
    norm_offset: float | None = None


CASES = {
    "halves": Case(),
    "three queries a group, padded head size": Case(9, 3, 80, 80),
    "interleaved": Case(interleaved=True),
    "interleaved, padded head size": Case(4, 4, 96, 96, True),
    "partial": Case(4, 4, 80, 32),
    "partial, interleaved": Case(8, 2, 128, 64, True),
    "no rotation": Case(4, 1, 64, 0),
    "norms": Case(8, 2, 128, 128, norm_offset=0.0),
    "norms with offset, interleaved": Case(4, 1, 256, 256, True, norm_offset=1.0),
    "norms, no rotation": Case(4, 2, 96, 0, norm_offset=0.0),
}


@dataclass
class Places:
    positions: torch.Tensor
    write_origins: torch.Tensor
    write_offsets: torch.Tensor


def places() -> Places:
    """Five tokens in pages 4, 11, 0 + BLOCK, of which the third is padding with nonsense for a position."""
    return Places(
        torch.tensor([7, 0, 1 << 30, 63, 5], dtype=torch.int32),
        torch.tensor([4 - BLOCK, 11 - BLOCK, -9999, -2, 4 - BLOCK], dtype=torch.int32),
        torch.tensor([3, 0, -1, 2, 1], dtype=torch.int32),
    )


def angle_table(rotary: int) -> torch.Tensor:
    angles = torch.arange(MAX_POSITIONS)[:, None] * torch.rand(rotary // 2)
    return torch.stack((angles.cos(), angles.sin()), dim=1)


def poisoned(case: Case, dtype: torch.dtype) -> PagedKV:
    shape = (PAGES, PAGE_TOKENS, case.kv_heads, case.head_dim)
    return PagedKV(torch.full(shape, NAN, dtype=dtype), torch.full(shape, NAN, dtype=dtype))


def inputs(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, Rotation | None, HeadNorms | None]:
    """qkv, of which the row of padding is NaN; rotation; norms."""
    qkv = torch.randn(5, (case.heads + 2 * case.kv_heads) * case.head_dim).to(dtype)
    qkv[2] = NAN
    rotation = None
    if case.rotary:
        rotation = Rotation(angle_table(case.rotary), is_interleaved=case.interleaved)
    norms = None
    if case.norm_offset is not None:
        weights = torch.randn(2, case.head_dim).to(dtype)
        norms = HeadNorms(weights[0], weights[1], 1e-6, case.norm_offset)
    return qkv, rotation, norms


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_the_reference(case: Case, dtype: torch.dtype) -> None:
    """q and the pages; what belongs to padding, and all pages but those written, stay as they were."""
    qkv, rotation, norms = inputs(case, dtype)
    kv, expected_kv = poisoned(case, dtype), poisoned(case, dtype)
    q = torch.full((5, case.heads, case.head_dim), NAN, dtype=dtype)
    rope_and_write(qkv, q, kv, places(), BLOCK, rotation, norms)
    in_range = places()
    in_range.positions[2] = 0
    expected = reference_rope_and_write(qkv, expected_kv, in_range, BLOCK, rotation, norms)
    real, tolerance = [0, 1, 3, 4], TOLERANCE[dtype]
    assert_close(q[real], expected[real], tolerance, tolerance, "q")
    assert q[2].isnan().all()
    for name, pages, wanted in (("k", kv.k, expected_kv.k), ("v", kv.v, expected_kv.v)):
        assert torch.equal(pages.isnan(), wanted.isnan()), name
        assert int((~pages.isnan()).sum()) == 4 * case.kv_heads * case.head_dim
        assert_close(pages.nan_to_num(), wanted.nan_to_num(), tolerance, tolerance, name)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("interleaved", "rotate"), [(False, rotate_halves), (True, rotate_interleaved)])
def test_it_rotates_as_transformers_does(interleaved: bool, rotate: object, dtype: torch.dtype) -> None:
    """In either layout of the pairs, and v is stored unchanged."""
    case = Case(heads=4, kv_heads=2, interleaved=interleaved)
    qkv, rotation, _ = inputs(case, dtype)
    assert rotation is not None and callable(rotate)
    qkv[2] = 0
    kv, batch = poisoned(case, dtype), places()
    batch.positions[2], batch.write_origins[2], batch.write_offsets[2] = 9, 5 - BLOCK, 0
    q = torch.empty(5, 4, 64, dtype=dtype)
    rope_and_write(qkv, q, kv, batch, BLOCK, rotation)
    heads = qkv.float().view(5, 8, 64).transpose(0, 1)[None]
    layout = (lambda x: x.repeat_interleave(2, -1)) if interleaved else (lambda x: x.repeat(1, 2))
    cos, sin = (layout(part)[None] for part in rotation.angles[batch.positions.long()].unbind(1))
    expected_q, expected_k = rotate(heads[:, :4], heads[:, 4:6], cos, sin)
    tolerance = TOLERANCE[dtype]
    assert_close(q, expected_q[0].transpose(0, 1), tolerance, tolerance, "q")
    slots = ((batch.write_origins + BLOCK) * PAGE_TOKENS + batch.write_offsets).long()
    keys, values = kv.gather(slots)
    assert_close(keys, expected_k[0].transpose(0, 1), tolerance, tolerance, "k")
    assert torch.equal(values, qkv.view(5, 8, 64)[:, 6:])


@dataclass(slots=True)
class ScaledKV(PagedKV):
    """A slab of whole numbers with a scale for each token and head."""

    k_scales: torch.Tensor
    v_scales: torch.Tensor

    @property
    def slabs(self) -> tuple[torch.Tensor, ...]:
        return self.k, self.v, self.k_scales, self.v_scales


@pytest.mark.parametrize(
    "case", [CASES["halves"], CASES["partial, interleaved"], CASES["no rotation"]], ids=str
)
def test_keys_and_values_are_rounded_where_the_slab_has_scales(case: Case) -> None:
    """The nearest whole numbers times the scale of their token and head; NaN where a head is not finite."""
    qkv, rotation, _ = inputs(case, torch.float32)
    plain, q = poisoned(case, torch.float32), torch.zeros(5, case.heads, case.head_dim)
    qkv[3, -1] = float("inf")
    rope_and_write(qkv, q, plain, places(), BLOCK, rotation)
    shape = plain.k.shape
    whole, scales = torch.full(shape, 77, dtype=torch.int8), torch.full(shape[:-1], 7.0)
    rounded = ScaledKV(whole, whole.clone(), scales, scales.clone())
    rope_and_write(qkv, torch.zeros_like(q), rounded, places(), BLOCK, rotation)
    stored = [(plain.k, rounded.k, rounded.k_scales), (plain.v, rounded.v, rounded.v_scales)]
    for exact, numbers, factors in stored:
        is_written = ~exact.isnan().all(-1)
        assert int(is_written.sum()) == 4 * case.kv_heads
        assert (factors[~is_written] == 7).all() and (numbers[~is_written] == 77).all()
        is_finite = is_written & exact.isfinite().all(-1)
        expected = exact[is_finite].abs().amax(-1) / 127
        assert_close(factors[is_finite], expected, 0, 1e-6, "scales")
        errors = numbers[is_finite] * factors[is_finite][:, None] - exact[is_finite]
        assert (errors.abs() <= expected[:, None] * 0.501).all()
        assert factors[is_written & ~is_finite].isnan().all()
    assert int(rounded.v_scales.isnan().sum()) == 1, "only the one head that is not finite"


@pytest.mark.parametrize(
    "case", [CASES["halves"], CASES["partial, interleaved"], CASES["no rotation"]], ids=str
)
def test_keys_and_values_in_float8_are_what_torch_rounds_them_to(case: Case) -> None:
    """Byte by byte, beyond the format's range and for NaN, too; padding and all other places stay."""
    qkv, rotation, _ = inputs(case, torch.float32)
    qkv[0, -3:] = torch.tensor([1e4, NAN, float("inf")])
    qkv[1] *= 2**-8
    shape = (PAGES, PAGE_TOKENS, case.kv_heads, case.head_dim)
    exact = poisoned(case, torch.float32)
    written, expected = (Float8KV.allocate(shape, torch.float32, DEVICE) for _ in range(2))
    for kv in (written, expected):
        for slab in kv.slabs:
            slab.fill_(0x55)
    batch, q = places(), torch.zeros(5, case.heads, case.head_dim)
    rope_and_write(qkv, q, exact, batch, BLOCK, rotation)
    rope_and_write(qkv, q.clone(), written, batch, BLOCK, rotation)
    slots = ((batch.write_origins + BLOCK) * PAGE_TOKENS + batch.write_offsets)[[0, 1, 3, 4]].long()
    expected.write(slots, *exact.gather(slots))
    for found, wanted in zip(written.slabs, expected.slabs, strict=True):
        is_nan = (wanted & 0x7F) == 0x7F
        assert torch.equal(found[~is_nan], wanted[~is_nan])
        assert ((found & 0x7F) == 0x7F)[is_nan].all()


def test_angles_may_be_those_of_the_tokens() -> None:
    """Rows of the angles chosen by token give what the table gives for its position."""
    qkv, rotation, _ = inputs(Case(), torch.float32)
    assert rotation is not None
    batch = places()
    batch.positions[2] = 0
    by_token = Rotation(
        rotation.angles[batch.positions.long()].contiguous(), torch.arange(5, dtype=torch.int32)
    )
    found = []
    for rotated in (rotation, by_token):
        kv, q = poisoned(Case(), torch.float32), torch.zeros(5, 6, 64)
        rope_and_write(qkv, q, kv, batch, BLOCK, rotated)
        found.append((q, kv.k.nan_to_num()))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_tensors_that_do_not_fit_are_refused() -> None:
    """By name: too wide a qkv, places in another dtype, angles of another shape."""
    qkv, rotation, _ = inputs(Case(), torch.float32)
    kv, q, batch = poisoned(Case(), torch.float32), torch.zeros(5, 6, 64), places()
    with pytest.raises(ValueError, match="qkv has shape"):
        rope_and_write(torch.zeros(5, 704), q, kv, batch, BLOCK, rotation)
    with pytest.raises(ValueError, match=r"angles \[64, 2, 48\] must be"):
        rope_and_write(qkv, q, kv, batch, BLOCK, Rotation(torch.zeros(64, 2, 48)))
    whole = PagedKV(kv.k.char(), kv.v.char())
    with pytest.raises(ValueError, match=r"k is torch.int8, and the slab has no scales"):
        rope_and_write(qkv, q, whole, batch, BLOCK, rotation)
    batch.write_offsets = batch.write_offsets.long()
    with pytest.raises(ValueError, match=r"write_offsets is torch.int64: it must be torch.int32"):
        rope_and_write(qkv, q, kv, batch, BLOCK, rotation)
