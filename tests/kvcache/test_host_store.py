"""Pages of idle sessions in host memory: the same bytes come back, and the disk is used after it or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from petalsd.errors import SpillError
from petalsd.kvcache.host_store import HostStore
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.spill import Spill, SpillArea
from tests.kvcache.test_spill import WHOLE, Notes, read, step

PAGE_BYTES = 6 * 4 + 4


def some_slabs() -> tuple[torch.Tensor, ...]:
    """40 pages in slabs of two dtypes and sizes."""
    return (
        torch.arange(40 * 6, dtype=torch.float32).view(40, 6),
        torch.arange(160).view(40, 4).to(torch.int8),
    )


def test_runs_are_cut_where_pieces_end() -> None:
    """Memory is taken piece by piece, as slots are used, and every page comes back to its place."""
    slabs = some_slabs()
    store = HostStore(slabs, 35 * PAGE_BYTES, piece_bytes=4 * PAGE_BYTES)
    assert (store.num_slots, store.allocated_bytes) == (35, 0)
    transfers = np.array([[3, 2, 9], [30, 30, 2]], dtype=np.int32)  # pieces 0, 1, 2 and 7
    before = [slab.clone() for slab in slabs]
    store.write(transfers)
    assert store.allocated_bytes == 4 * 4 * PAGE_BYTES
    for slab in slabs:
        slab.zero_()
    store.read(transfers)
    pages = [*range(3, 12), 30, 31]
    for slab, old in zip(slabs, before, strict=True):
        assert torch.equal(slab[pages], old[pages])
        assert not slab[sorted(set(range(40)) - set(pages))].any()


def test_the_size_can_be_asked_for_while_pieces_are_taken() -> None:
    """Metrics are read on the loop, and pieces are taken on the engine thread."""

    class Part:
        """One during whose counting the engine thread comes by."""

        @property
        def nbytes(self) -> int:
            store.write(np.array([[0, 4, 1]], dtype=np.int32))
            return 0

    store = HostStore(some_slabs(), 35 * PAGE_BYTES, piece_bytes=4 * PAGE_BYTES)
    store._pieces[0] = [Part()]  # type: ignore[list-item]
    assert store.allocated_bytes == 0


def test_the_file_takes_what_the_memory_does_not(tmp_path: Path) -> None:
    """A run across the border is cut there; the file's own slots begin at 0, so it holds no more than its part."""
    slabs, notes = some_slabs(), Notes()
    spill = Spill(SpillArea(tmp_path, 20 * PAGE_BYTES, 0, host_bytes=10 * PAGE_BYTES), notes)
    spill.open(slabs)
    assert (spill.file.grow_to(8), spill.file.allocated_bytes()) == (10, 0)
    assert spill.file.grow_to(25) == 30
    transfers = bytearray(np.array([[0, 4, 3], [20, 7, 9], [10, 16, 6]], dtype=np.int32).tobytes())
    before = [slab.clone() for slab in slabs]
    spill.write(transfers)
    for slab in slabs:
        slab.zero_()
    spill.read(transfers)
    pages = [0, 1, 2, *range(20, 29), *range(10, 16)]
    for slab, old in zip(slabs, before, strict=True):
        assert torch.equal(slab[pages], old[pages])
    assert notes.spilled_bytes == notes.restored_bytes == 18 * PAGE_BYTES
    assert spill.host_bytes > 0
    spill.close()
    assert spill.host_bytes == 0


@pytest.mark.parametrize("directory", ["", "missing"], ids=["no file wanted", "no file possible"])
async def test_sessions_live_in_host_memory_alone(
    make_pool: Callable[..., KVPool], tmp_path: Path, directory: str
) -> None:
    """Two sessions of the whole pool take turns without a disk."""
    pages = 2 * 24
    area = SpillArea(tmp_path / directory, 1 << 20 if directory else 0, 0, host_bytes=pages * 192)
    pool = make_pool(25, spill=area)
    one, two = await pool.reserve(WHOLE, 0), await pool.reserve(WHOLE, 0)
    step(pool, one, 48, mark=0)
    step(pool, two, 48, mark=100)
    assert read(pool, one) == [[*range(48)]]
    assert read(pool, two) == [[*range(100, 148)]]
    assert (pool.spill_bytes, pool.spill_host_bytes > 0) == (0, True)
    one.close()
    two.close()


async def test_memory_that_cannot_be_locked(
    make_pool: Callable[..., KVPool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a full disk: the pages stay, whoever came for them fails, and the one that has them goes on."""
    pool = make_pool(25, spill=SpillArea(tmp_path, 0, 0, host_bytes=48 * 192))
    one, two = await pool.reserve(WHOLE, 0), await pool.reserve(WHOLE, 0)
    step(pool, one, 48, mark=0)

    def refuse(store: HostStore, slab: torch.Tensor) -> torch.Tensor:
        raise SpillError("host memory cannot be page-locked: CUDA error: out of memory")

    monkeypatch.setattr(HostStore, "_lock", refuse)
    room = pool.make_room([(two, 4)])
    assert room.ready == []
    assert isinstance(room.failed[0], SpillError)
    two.close()
    assert read(pool, one) == [[*range(48)]]
    one.close()
