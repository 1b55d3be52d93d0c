"""Pages on the disk: whose they are, that their room is real, and what a disk does that is full or broken."""

from __future__ import annotations

import contextlib
import os
import resource
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from petalsd._C import SpillFile
from petalsd.errors import KVPoolError, OutOfPages, SpillError
from petalsd.kvcache import spill as spill_module
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.session import KVRequest, KVSession
from petalsd.kvcache.spill import Spill, SpillArea
from tests.kvcache.test_pool import contents, grow

WHOLE = KVRequest(first_block=3, num_blocks=2, batch=1, max_tokens=48)  # all 24 pages


class Notes:
    """Counts what a pool tells its observer."""

    def __init__(self) -> None:
        self.shared = self.moved = self.spilled_bytes = self.restored_bytes = self.failures = 0

    def copied(self, num_shared: int, num_moved: int) -> None:
        self.shared += num_shared
        self.moved += num_moved

    def spilled(self, num_bytes: int, seconds: float) -> None:
        assert seconds > 0
        self.spilled_bytes += num_bytes

    def restored(self, num_bytes: int, seconds: float) -> None:
        assert seconds > 0
        self.restored_bytes += num_bytes

    def spill_failed(self) -> None:
        self.failures += 1


@pytest.fixture
def area(tmp_path: Path) -> SpillArea:
    """Room for a few sessions; the directory is empty."""
    return SpillArea(tmp_path, max_bytes=64 * 768, keep_free_bytes=0)


def step(pool: KVPool, session: KVSession, count: int, mark: int) -> None:
    """A batch of this session alone."""
    assert pool.make_room([(session, session.length + count)]).ready == [0]
    grow(pool, session, count, mark)


def read(pool: KVPool, session: KVSession) -> list[list[int]]:
    """The session's tokens, wherever they were."""
    assert pool.make_room([(session, session.length)]).ready == [0]
    return contents(pool, session)


@contextlib.contextmanager
def no_larger_files_than(num_bytes: int) -> Iterator[None]:
    """Writes of this process beyond so many bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def our_unnamed_files(directory: Path) -> list[int]:
    """Descriptors of this process's open files that lie there and have no name."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            if str(link.readlink()).startswith(f"{directory}/") and link.stat().st_nlink == 0:
                found.append(int(link.name))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
async def test_what_goes_to_the_disk_comes_back(
    make_pool: Callable[..., KVPool], area: SpillArea, dtype: torch.dtype
) -> None:
    """Two sessions that each fill the memory take turns; what was full is not written again."""
    notes = Notes()
    pool = make_pool(25, dtype, spill=area, observer=notes)
    one, two = await pool.reserve(WHOLE, 0), await pool.reserve(WHOLE, 0)
    step(pool, one, 40, mark=0)
    step(pool, two, 44, mark=64)
    step(pool, one, 2, mark=0)
    assert read(pool, two) == [[*range(64, 108)]]
    assert read(pool, one) == [[*range(42)]]
    page_bytes = pool.geometry.page_bytes
    # One: 9 runs, then the one that grew and the last; two: all but the last, and then nothing new.
    assert notes.spilled_bytes < 2 * 24 * page_bytes
    assert notes.restored_bytes > notes.spilled_bytes
    assert pool.stats().pages_restored * page_bytes == notes.restored_bytes
    assert notes.failures == 0


async def test_the_file_is_private_and_its_room_is_real(
    make_pool: Callable[..., KVPool], area: SpillArea
) -> None:
    """No name, no permissions for others, blocks behind every promised byte; gone once the pool closes."""
    pool = make_pool(25, spill=area)
    assert list(area.directory.iterdir()) == []
    (descriptor,) = our_unnamed_files(area.directory)
    file = os.fstat(descriptor)
    assert stat.S_IMODE(file.st_mode) == 0o600
    assert file.st_size == 0, "nothing is promised beyond the memory yet"
    await pool.reserve(WHOLE, 0)
    assert pool.spill_bytes == 0
    await pool.reserve(WHOLE, 0)
    file = os.fstat(descriptor)
    assert pool.spill_bytes == file.st_size >= 2 * 24 * pool.geometry.page_bytes
    assert file.st_blocks * 512 >= file.st_size, "the file is sparse"
    pool.close()
    assert our_unnamed_files(area.directory) == []


async def test_the_disk_is_given_back_when_it_is_not_needed(
    make_pool: Callable[..., KVPool], area: SpillArea
) -> None:
    pool = make_pool(25, spill=area)
    one, two = await pool.reserve(WHOLE, 0), await pool.reserve(WHOLE, 0)
    step(pool, one, 48, mark=0)
    step(pool, two, 48, mark=0)
    assert pool.spill_bytes > 0
    one.close()
    two.close()
    assert pool.spill_bytes == 0
    (descriptor,) = our_unnamed_files(area.directory)
    assert os.fstat(descriptor).st_size == 0
    await pool.reserve(WHOLE, 0)
    await pool.reserve(WHOLE, 0)
    assert pool.spill_bytes > 0


async def test_promises_end_where_the_file_does(make_pool: Callable[..., KVPool], area: SpillArea) -> None:
    """As many pages as fit the file are promised; a single session is never told of more than the memory."""
    pool = make_pool(25, spill=area)
    capacity = pool.stats().pages_promisable
    assert capacity == area.max_bytes // pool.geometry.page_bytes
    assert pool.tokens_free == 24 * 4
    for _ in range(capacity // 24):
        await pool.reserve(WHOLE, 0)
    assert pool.tokens_free == capacity % 24 * 4
    with pytest.raises(OutOfPages, match=f"{capacity % 24} of {capacity} are not reserved"):
        await pool.reserve(WHOLE, 0)


async def test_a_full_disk_promises_nothing(make_pool: Callable[..., KVPool], area: SpillArea) -> None:
    """Room that the file system does not give is not promised; as soon as it gives it, it is."""
    pool = make_pool(25, spill=area)
    first = await pool.reserve(WHOLE, 0)
    with no_larger_files_than(4096):
        with pytest.raises(OutOfPages, match="0 of 24 are not reserved"):
            await pool.reserve(WHOLE, 0)
        assert pool.stats().pages_promisable == 24
        step(pool, first, 48, mark=0)
    await pool.reserve(WHOLE, 0)


async def test_the_disk_keeps_room_for_others(make_pool: Callable[..., KVPool], tmp_path: Path) -> None:
    """Nothing is allocated where less than keep_free_bytes would be left."""
    pool = make_pool(25, spill=SpillArea(tmp_path, max_bytes=1 << 30, keep_free_bytes=1 << 60))
    await pool.reserve(WHOLE, 0)
    with pytest.raises(OutOfPages):
        await pool.reserve(WHOLE, 0)
    assert pool.spill_bytes == 0


async def test_a_write_that_fails_leaves_everything_in_memory(
    make_pool: Callable[..., KVPool], area: SpillArea
) -> None:
    """A real failing system call: who needs the room fails, who is in memory stays, and afterwards all is well."""
    notes = Notes()
    pool = make_pool(25, spill=area, observer=notes)
    one, two = await pool.reserve(WHOLE, 0), await pool.reserve(WHOLE, 0)
    step(pool, one, 48, mark=0)
    with no_larger_files_than(100):  # of the 384 bytes that must go
        room = pool.make_room([(one, 48), (two, 4)])
        assert (room.ready, room.failed) == ([0], {})
        with capture_logs() as logs:
            room = pool.make_room([(two, 4)])
    assert room.ready == []
    assert str(room.failed[0]) == "spill_error: writing to the spill file failed: File too large"
    assert notes.failures == 1
    assert [(entry["event"], entry["operation"]) for entry in logs] == [("kv_spill_failed", "write")]
    assert pool.stats().pages_promisable == 24, "a broken disk backs no more promises"
    assert read(pool, one) == [[*range(48)]]
    step(pool, two, 4, mark=100)
    assert pool.stats().pages_promisable > 24
    assert read(pool, one) == [[*range(48)]]


async def test_a_read_that_fails_names_its_session(make_pool: Callable[..., KVPool], area: SpillArea) -> None:
    """A file that was cut off under us: an error for the session that lay there, and for no other."""
    pool = make_pool(25, spill=area)
    one, two = await pool.reserve(WHOLE, 0), await pool.reserve(WHOLE, 0)
    step(pool, one, 20, mark=0)
    step(pool, two, 40, mark=100)
    two.truncate(20)
    (descriptor,) = our_unnamed_files(area.directory)
    os.ftruncate(descriptor, 100)
    room = pool.make_room([(two, 20), (one, 20)])
    assert room.ready == [0]
    assert str(room.failed[1]) == "spill_error: reading from the spill file failed: Input/output error"
    one.close()
    assert read(pool, two) == [[*range(100, 120)]]


async def test_a_device_without_memory_for_buffers_fails_no_others(
    make_pool: Callable[..., KVPool], area: SpillArea, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a disk that fails: those whose pages were to move get the error, and nothing else happens."""
    notes = Notes()
    pool = make_pool(25, spill=area, observer=notes)
    one, two = await pool.reserve(WHOLE, 0), await pool.reserve(WHOLE, 0)
    step(pool, one, 48, mark=0)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 32.00 MiB.")

    with monkeypatch.context() as patch, capture_logs():
        patch.setattr(Spill, "_move", fail)
        room = pool.make_room([(one, 48), (two, 4)])
        assert room.ready == [0] and not room.failed
        room = pool.make_room([(two, 4)])
        assert room.ready == [] and "no memory left" in room.failed[0].message
    assert notes.failures == 1
    step(pool, two, 4, mark=100)
    with monkeypatch.context() as patch, capture_logs():
        patch.setattr(Spill, "_move", fail)
        two.close()
        assert list(pool.make_room([(one, 48)]).failed) == [0]
    assert notes.failures == 2


async def test_a_directory_that_takes_no_file(make_pool: Callable[..., KVPool], tmp_path: Path) -> None:
    """The pool works without the disk, and promises what its memory holds."""
    notes = Notes()
    pool = make_pool(25, spill=SpillArea(tmp_path / "missing", 1 << 20, 0), observer=notes)
    assert notes.failures == 1
    session = await pool.reserve(WHOLE, 0)
    with pytest.raises(OutOfPages, match="0 of 24"):
        await pool.reserve(WHOLE, 0)
    step(pool, session, 48, mark=0)
    assert read(pool, session) == [[*range(48)]]


async def test_without_room_a_session_cannot_be_extended(
    make_pool: Callable[..., KVPool], area: SpillArea
) -> None:
    """A caller that forgets to make room is told, and nothing is lost by it."""
    pool = make_pool(25, spill=area)
    one, two = await pool.reserve(WHOLE, 0), await pool.reserve(WHOLE, 0)
    step(pool, one, 48, mark=0)
    with pytest.raises(KVPoolError, match="extend takes 2 pages of 0 free ones"):
        two.extend(4)
    step(pool, two, 4, mark=100)
    with pytest.raises(
        KVPoolError, match="pages that are not in memory, of a session in the batch = none: 2 != 0"
    ):
        pool.fill_origins([one], np.zeros((1, 12), np.int32))
    assert read(pool, one) == [[*range(48)]]


def test_pages_of_another_device_go_through_a_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk by chunk, slabs of several dtypes and sizes, the same bytes as without."""
    monkeypatch.setattr(spill_module, "_STAGING_BYTES", 3 * (24 + 4))
    slabs = (
        torch.arange(40 * 6, dtype=torch.float32).view(40, 6),
        torch.arange(160).view(40, 4).to(torch.int8),
    )
    spill = Spill(SpillArea(tmp_path, 1 << 20, 0), Notes())
    spill.open(slabs)
    assert spill.file.grow_to(40) >= 40
    transfers = bytearray(
        torch.tensor([[3, 0, 2], [30, 2, 7], [11, 20, 1], [20, 30, 4]], dtype=torch.int32).numpy()
    )
    spill._staged_write(transfers)
    expected = [slab.clone() for slab in slabs]
    for slab in slabs:
        slab.zero_()
    spill.read(transfers)
    pages = [3, 4, *range(30, 37), 11, *range(20, 24)]
    others = sorted(set(range(40)) - set(pages))
    for slab, before in zip(slabs, expected, strict=True):
        assert torch.equal(slab[pages], before[pages])
        assert not slab[others].any()
    for slab in slabs:
        slab.zero_()
    spill._staged_read(transfers)
    for slab, before in zip(slabs, expected, strict=True):
        assert torch.equal(slab[pages], before[pages])
    spill.close()


def test_a_file_of_no_slots_says_so(tmp_path: Path) -> None:
    """Closed, or never opened: an error of the system's, not a crash."""
    file = SpillFile(str(tmp_path), 1 << 20, 0)
    assert file.grow_to(1) == 0
    transfers = bytearray(torch.tensor([[0, 0, 1]], dtype=torch.int32).numpy())
    slab = torch.zeros(1, 8)
    with pytest.raises(SpillError, match="Bad file descriptor"):
        file.write(transfers, [(slab.data_ptr(), 32)])
    with pytest.raises(KVPoolError, match="whole ones"):
        file.read(transfers[:5], [(slab.data_ptr(), 32)])
