"""Pages in the kernels' order: what is written is read again, by torch and by the kernels alike."""

from __future__ import annotations

import pytest
import torch

from petalsd.kvcache.sizing import KVGeometry
from petalsd.ops.head_major import HeadMajorKV
from tests.models.test_native_span import INDEX, LENGTHS, Run, by_torch, make_block, make_native

PAGES, PAGE_TOKENS, KV_HEADS, HEAD_DIM = 5, 48, 3, 20
INT8_MAX = 127
BROKEN_ROW = 3
STORED = [
    pytest.param(torch.float32, torch.float32, id="float32"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bfloat16"),
    pytest.param(torch.float32, torch.int8, id="int8-float32"),
    pytest.param(torch.bfloat16, torch.int8, id="int8-bfloat16"),
]


def make_pages(dtype: torch.dtype, stored: torch.dtype | None = None) -> HeadMajorKV:
    kv = HeadMajorKV.allocate((PAGES, PAGE_TOKENS, KV_HEADS, HEAD_DIM), dtype, stored)
    for slab in kv.slabs:
        slab.fill_(torch.nan if slab.is_floating_point() else -128)
    return kv


def draw(count: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[count, Hkv, D]`` of heads of very different size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.arange(-2, KV_HEADS - 2).view(1, -1, 1)
    k, v = (torch.randn(count, KV_HEADS, HEAD_DIM, generator=generator) * sizes for _ in range(2))
    return k.to(dtype), v.to(dtype)


def some_slots(count: int) -> torch.Tensor:
    """In no order, over all pages."""
    return torch.randperm(PAGES * PAGE_TOKENS, generator=torch.Generator().manual_seed(1))[:count]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_gathered(dtype: torch.dtype) -> None:
    """Bit for bit, from any slots in any order; other slots keep what they hold."""
    kv, (k, v) = make_pages(dtype), draw(90, dtype)
    slots = some_slots(100)
    kv.write(slots[:90], k, v)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(2))
    gathered = kv.gather(slots[order])
    assert torch.equal(gathered[0], k[order])
    assert torch.equal(gathered[1], v[order])
    assert all(states.isnan().all() for states in kv.gather(slots[90:]))
    kv.write(slots[:1], k[1:2], v[1:2])
    gathered = kv.gather(slots[:90])
    assert torch.equal(gathered[0], torch.cat([k[1:2], k[1:]]))
    assert torch.equal(gathered[1], torch.cat([v[1:2], v[1:]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_half_a_step_off_at_most(dtype: torch.dtype) -> None:
    """A step is a 127th of the greatest element of a token's head; bfloat16 rounds what comes out once more."""
    kv, written = make_pages(dtype, torch.int8), draw(90, dtype)
    slots = some_slots(90)
    kv.write(slots, *written)
    for states, gathered in zip(written, kv.gather(slots), strict=True):
        assert gathered.dtype == dtype
        step = states.float().abs().amax(-1, keepdim=True) / INT8_MAX
        off = (gathered.float() - states.float()).abs()
        rounding = torch.finfo(dtype).eps * states.float().abs() + 1e-6 * step
        assert (off <= step / 2 + rounding).all()
        assert (off.amax(-1, keepdim=True) > step / 8).any(), "8 bits are not exact"


def test_int8_keeps_zeros() -> None:
    """A head of zeros has no greatest element to divide by."""
    kv, (k, v) = make_pages(torch.float32, torch.int8), draw(4, torch.float32)
    k[1, 2] = v[3] = 0
    kv.write(torch.arange(4), k, v)
    gathered = kv.gather(torch.arange(4))
    assert (gathered[0][1, 2] == 0).all()
    assert (gathered[1][3] == 0).all()
    assert all(states.isfinite().all() for states in gathered)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("dtype", "stored"), STORED)
def test_what_is_not_finite_stays_in_its_head(dtype: torch.dtype, stored: torch.dtype, bad: float) -> None:
    """It comes back as not finite, and other heads, tokens and the values are as without it."""
    slots, (k, v) = some_slots(9), draw(9, dtype)
    clean, dirty = make_pages(dtype, stored), make_pages(dtype, stored)
    clean.write(slots, k, v)
    spoilt = k.clone()
    spoilt[4, 1, 7] = bad
    dirty.write(slots, spoilt, v)
    (k_clean, v_clean), (k_dirty, v_dirty) = clean.gather(slots), dirty.gather(slots)
    assert not k_dirty[4, 1, 7].isfinite()
    assert torch.equal(v_dirty, v_clean)
    k_dirty[4, 1] = k_clean[4, 1]
    assert torch.equal(k_dirty, k_clean)


@pytest.mark.parametrize(("dtype", "stored"), STORED)
def test_pages_take_what_the_geometry_says(dtype: torch.dtype, stored: torch.dtype) -> None:
    """The first dimension of every slab is the pages', and their bytes are those that memory is planned with."""
    slabs = make_pages(dtype, stored).slabs
    geometry = KVGeometry(PAGE_TOKENS, KV_HEADS, HEAD_DIM, stored, is_head_major=True)
    assert sum(slab.nbytes for slab in slabs) == PAGES * geometry.page_bytes
    assert {slab.shape[0] for slab in slabs} == {PAGES}


@pytest.mark.parametrize("page_tokens", [1, 8, 17, 24])
def test_other_page_sizes_are_refused(page_tokens: int) -> None:
    """The message names the size: a strip of 16 tokens may not end in the midst of a page."""
    with pytest.raises(ValueError, match=f"pages of {page_tokens} tokens in torch.float32"):
        HeadMajorKV.allocate((PAGES, page_tokens, KV_HEADS, HEAD_DIM), torch.float32)


def test_other_dtypes_are_refused() -> None:
    """There are no kernels for float16."""
    with pytest.raises(ValueError, match=r"torch\.float16"):
        HeadMajorKV.allocate((PAGES, PAGE_TOKENS, KV_HEADS, HEAD_DIM), torch.float16)


def prefilled(dtype: torch.dtype, stored: torch.dtype, is_native: bool) -> Run:
    """Rows that were written by the kernels or by torch, one of them with NaN in it."""
    block = make_block(dtype)
    run = Run(block, LENGTHS, stored=stored)
    run.histories[BROKEN_ROW][5] = torch.nan
    run.prefill(make_native(block) if is_native else by_torch(block))
    return run


def written_slots(run: Run) -> torch.Tensor:
    """Of all tokens in the block, row by row."""
    page_tokens, batch = run.rows.kv.page_tokens, run.rows.extend(dict.fromkeys(run.ids, 0))
    slots = []
    for origins, length in zip(batch.origins.long(), batch.context_lens, strict=True):
        positions = torch.arange(length)
        slots.append((origins[positions // page_tokens] + INDEX) * page_tokens + positions % page_tokens)
    return torch.cat(slots)


@pytest.mark.parametrize(("dtype", "stored"), STORED)
def test_the_kernels_write_what_torch_writes(dtype: torch.dtype, stored: torch.dtype) -> None:
    """Into the same slots, to the rounding of the dtype and a step of 8 bits; NaN where torch has it."""
    by_kernels, plain = (prefilled(dtype, stored, is_native) for is_native in (True, False))
    slots = written_slots(plain)
    tolerance = 2e-5 if dtype == torch.float32 else 0.03
    for ours, theirs in zip(by_kernels.rows.kv.gather(slots), plain.rows.kv.gather(slots), strict=True):
        assert theirs.isnan().any()
        assert torch.equal(ours.isnan(), theirs.isnan())
        ours, theirs = ours.float(), theirs.float()
        step = theirs.abs().amax(-1, keepdim=True) / INT8_MAX if stored == torch.int8 else 0.0
        off = (ours - theirs).abs() - tolerance * (1 + theirs.abs()) - step
        assert off.nan_to_num(0.0).max() <= 0


@pytest.mark.parametrize(("dtype", "stored"), STORED)
def test_the_kernels_write_nothing_else(dtype: torch.dtype, stored: torch.dtype) -> None:
    """Slots that no token is in keep what they hold, in pages of the rows and of others."""
    run = prefilled(dtype, stored, is_native=True)
    kv = run.rows.kv
    is_free = torch.ones(len(kv.k) * kv.page_tokens, dtype=torch.bool)
    is_free[written_slots(run)] = False
    assert all(states.isnan().all() for states in kv.gather(is_free.nonzero().flatten()))


@pytest.mark.parametrize(("dtype", "stored"), STORED)
@pytest.mark.parametrize("is_native", [True, False], ids=["kernels-write", "torch-writes"])
def test_either_reads_what_the_other_wrote(dtype: torch.dtype, stored: torch.dtype, is_native: bool) -> None:
    """A decode step over the very same pages, by torch and by the kernels; NaN stays in the row that has it."""
    outputs = []
    for reads_native in (True, False):
        run = prefilled(dtype, stored, is_native)
        run.histories = [states[:0] for states in run.histories]
        outputs.append(run.decode(make_native(run.block) if reads_native else by_torch(run.block)).float())
    by_kernels, plain = outputs
    assert torch.equal(by_kernels.isnan(), plain.isnan())
    rows = [row for row in range(len(LENGTHS)) if row != BROKEN_ROW]
    assert plain[BROKEN_ROW].isnan().all()
    # The new token's own key may be rounded to the next step of the stored dtype.
    off = (by_kernels[rows] - plain[rows]).norm() / plain[rows].norm()
    assert off < (2e-5 if dtype == stored == torch.float32 else 0.01)
