"""Page copies of all slabs in one launch, and how pending copies are cut into launches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from petalsd.kvcache.page_copies import copy_by_kernel, copy_by_torch, page_copier
from petalsd.ops.eight_bit_kv import Float8KV, Int8KV
from petalsd.ops.launching import record_launches
from petalsd.ops.page_copies import copy_pages, independent_copies
from petalsd.ops.ragged import PagedKV
from tests.device import DEVICE
from tests.kernels.sparse_slabs import sparse_pages

PAGES = st.integers(1, 6)
CPU = torch.device("cpu")


def slabs(kind: str) -> PagedKV:
    """Twelve pages of random bytes; two heads of 80 make pages that are no power of two long."""
    shape = (12, 16, 2, 80)
    if kind == "int8":
        kv: PagedKV = Int8KV.allocate(shape, torch.float32, DEVICE)
    elif kind == "float8":
        kv = Float8KV.allocate(shape, torch.float32, DEVICE)
    else:
        kv = PagedKV(*(torch.empty(shape, dtype=getattr(torch, kind)) for _ in range(2)))
    for slab in kv.slabs:
        slab.view(torch.uint8).random_(0, 256)
    return kv


@pytest.mark.parametrize("kind", ["float32", "float16", "int8", "float8"])
def test_pages_are_copied_bit_by_bit_and_no_other_is_touched(kind: str) -> None:
    """One launch for keys, values and scales; a page may be copied to several, NaN and all."""
    kv = slabs(kind)
    before = [slab.view(torch.uint8).clone() for slab in kv.slabs]
    sources, targets = torch.tensor([3, 3, 11], dtype=torch.int32), torch.tensor([1, 7, 2], dtype=torch.int32)
    with record_launches() as launches:
        copy_pages(kv, sources, targets)
    assert len(launches) == 1
    for slab, old in zip(kv.slabs, before, strict=True):
        expected = old.clone()
        expected[targets] = old[sources]
        assert torch.equal(slab.view(torch.uint8), expected)


def test_pages_far_into_a_slab_are_found() -> None:
    """Page times page size is more than 32 bits hold."""
    kv = sparse_pages(600_000, 16, 1, 256)
    kv.k[5], kv.v[5] = 1, 2
    copy_pages(kv, torch.tensor([5], dtype=torch.int32), torch.tensor([600_000], dtype=torch.int32))
    assert (kv.k[-1] == 1).all() and (kv.v[-1] == 2).all()


@given(st.lists(st.tuples(PAGES, PAGES), max_size=12))
def test_independent_copies_in_any_order_are_all_copies_in_order(pairs: list[tuple[int, int]]) -> None:
    """Within a part nothing is read or written that is written there, so even reversed it has the same effect."""
    expected, parted = list(range(7)), list(range(7))
    for source, target in pairs:
        expected[target] = expected[source]
    parts = list(independent_copies(pairs))
    for part in parts:
        for source, target in reversed(part):
            parted[target] = parted[source]
    assert parted == expected
    assert [pair for part in parts for pair in part] == pairs
    assert all(parts)


def test_copies_of_a_beam_are_one_part() -> None:
    """What copy-on-write asks for, one source and many targets, is not cut."""
    assert len(list(independent_copies([(1, target) for target in range(2, 40)]))) == 1


def test_a_pool_copies_by_the_kernel_as_by_torch() -> None:
    """A run that moves down onto itself, and a page that is written after it was read."""
    pairs = torch.tensor([[5, 4], [6, 5], [7, 6], [1, 9], [2, 1]], dtype=torch.int32)
    by_torch = slabs("int8")
    by_kernel = Int8KV(*(slab.clone() for slab in by_torch.slabs), torch.float32)
    copy_by_torch(by_torch, pairs)
    copy_by_kernel(by_kernel, pairs)
    for mine, its in zip(by_kernel.slabs, by_torch.slabs, strict=True):
        assert torch.equal(mine.view(torch.uint8), its.view(torch.uint8))
    assert page_copier(torch.device("cuda")) is copy_by_kernel
    assert page_copier(CPU) is copy_by_torch
