"""KVPool: the device memory of the KV cache, and the pages that divide it among sessions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from petalsd._C import PagePool, PoolStats
from petalsd.errors import KVPoolError, PetalsdError, SpillError
from petalsd.kvcache.observer import NullPoolObserver, PoolObserver
from petalsd.kvcache.page_copies import page_copier
from petalsd.kvcache.session import KVRequest, KVSession
from petalsd.kvcache.sizing import KVGeometry
from petalsd.kvcache.spill import Spill, SpillArea
from petalsd.kvcache.waiting import AdmissionRules, WaitingRoom
from petalsd.ops.eight_bit_kv import EIGHT_BIT_KV
from petalsd.ops.head_major import HeadMajorKV
from petalsd.ops.memory import empty
from petalsd.ops.ragged import PagedKV

# Page copies go through a temporary copy of their sources; this bounds it, for keys and values each.
_COPY_BUFFER_BYTES = 32 << 20

_DEFAULT_RULES = AdmissionRules()
_NOBODY = NullPoolObserver()


@dataclass(slots=True)
class BatchRoom:
    """Sessions of a batch by their index: ``ready`` ones run now, ``failed`` ones cannot: the disk failed them.

    Those must be closed; their pages may hold anything. Whoever is in neither must be in the next batch, without
    others that were not in this one.
    """

    ready: list[int]
    failed: dict[int, SpillError] = field(default_factory=dict)


class KVPool:
    """``num_pages`` pages (page 0 is never used) of ``geometry``, in ``dtype`` on ``device``.

    With ``spill`` more is promised than the pages hold: those of idle sessions go to a file when others need them.

    ``reserve`` belongs to an event loop, ``make_room``, ``apply_copies`` and ``fill_origins`` to the engine
    thread; before each batch it makes room for the batch's sessions, extends those that are ready, then applies
    the copies, then fills the origins, which hold until it makes room or extends a session again.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        num_pages: int,
        dtype: torch.dtype,
        device: torch.device,
        rules: AdmissionRules = _DEFAULT_RULES,
        spill: SpillArea | None = None,
        observer: PoolObserver = _NOBODY,
    ) -> None:
        self.geometry = geometry
        self.num_pages = num_pages
        self.dtype = dtype
        self.device = device
        self._observer = observer
        self._spill = None if spill is None else Spill(spill, observer)
        self._pages = PagePool(
            num_pages,
            geometry.page_tokens,
            None if self._spill is None else self._spill.file,
            rules.max_peer_share,
            rules.bypass_wait_s,
            rules.max_bypasses,
        )
        self._waiting_room = WaitingRoom(self._pages, rules.max_waiters)
        self._copy_limit = max(1, _COPY_BUFFER_BYTES // geometry.slab_page_bytes)
        self._copy = page_copier(device)
        self._known_copies = (0, 0)  # that made room, and on write: what the observer was told
        self._kv: PagedKV | None = None

    def allocate(self) -> PagedKV:
        """Take the memory, of undefined content; on a CPU the system maps it as it is first written."""
        geometry = self.geometry
        stored = geometry.stored
        if stored != self.dtype and stored not in EIGHT_BIT_KV:
            raise KVPoolError(f"pages of {stored} are not for blocks that compute in {self.dtype}")
        shape = (self.num_pages, *geometry.page_shape)
        if geometry.is_head_major:
            self._kv = HeadMajorKV.allocate(shape, self.dtype, stored)
        elif stored in EIGHT_BIT_KV:
            self._kv = EIGHT_BIT_KV[stored].allocate(shape, self.dtype, self.device)
        else:
            k, v = (empty(shape, self.dtype, self.device) for _ in range(2))
            self._kv = PagedKV(k, v)
        if self._spill is not None:
            self._spill.open(self._kv.slabs)
        return self._kv

    def close(self) -> None:
        """Give memory and disk back, once no session will run any more."""
        self._kv = None
        if self._spill is not None:
            self._spill.close()

    @property
    def kv(self) -> PagedKV:
        """The slab; its tensors never move."""
        if self._kv is None:
            raise KVPoolError("the pool has no memory yet: call allocate() first")
        return self._kv

    @property
    def tokens_free(self) -> int:
        """Tokens that one new session could reserve, summed over blocks: never more than the memory holds."""
        stats = self._pages.stats()
        pages = min(stats.pages_promisable - stats.pages_reserved, stats.pages_total)
        return max(0, pages) * self.geometry.page_tokens

    @property
    def spill_area(self) -> SpillArea | None:
        """Where pages of idle sessions may lie; None where they stay in memory."""
        return None if self._spill is None else self._spill.area

    @property
    def spill_host_bytes(self) -> int:
        """Page-locked memory that idle sessions' pages take now."""
        return 0 if self._spill is None else self._spill.host_bytes

    @property
    def spill_bytes(self) -> int:
        """Disk space that the spill file takes now."""
        return 0 if self._spill is None else self._spill.file.allocated_bytes()

    @property
    def can_spill(self) -> bool:
        """Whether ``make_room`` has anything to do."""
        return self._spill is not None

    async def reserve(self, request: KVRequest, timeout_s: float) -> KVSession:
        """Open a session that may grow to ``max_tokens``, waiting ``timeout_s`` for others to leave.

        Requests are served in the order they came, but for what ``AdmissionRules`` say. With a timeout of 0, or
        when the whole memory is too small, the answer comes at once. Raises OutOfPages with the numbers.
        """
        if timeout_s > 0:
            handle = await self._waiting_room.wait(request, timeout_s)
        else:
            handle = self._pages.try_open(
                request.first_block, request.num_blocks, request.batch, request.max_tokens, request.peer
            )
            self._waiting_room.deliver()
        return KVSession(request, self._pages, handle, self._waiting_room.deliver)

    def dismiss_waiters(self, error: PetalsdError) -> None:
        """End every ``reserve`` that waits with ``error``; on any thread."""
        self._waiting_room.dismiss(error)

    def make_room(self, wanted: Sequence[tuple[KVSession, int]]) -> BatchRoom:
        """Bring the pages of a batch's sessions into memory, with room for each to grow to its length.

        Pages of sessions that are not in the batch go to the spill file for it, least recently used ones first.
        """
        if self._spill is None:
            return BatchRoom(list(range(len(wanted))))
        self.apply_copies()
        handles, lengths = [session.handle for session, _ in wanted], [length for _, length in wanted]
        ready, spills = self._pages.plan_batch(handles, lengths, may_spill=True)
        room = BatchRoom(ready)
        if spills and (error := self._write(self._spill, spills)):
            room.ready, _ = self._pages.plan_batch(handles, lengths, may_spill=False)
            room.failed = dict.fromkeys(set(ready).difference(room.ready), error)
        self._restore(self._spill, room)
        return room

    def _write(self, spill: Spill, transfers: bytearray) -> SpillError | None:
        """The error of the disk, after which the pages stay in memory."""
        are_written = False
        try:
            spill.write(transfers)
            are_written = True
        except SpillError as error:
            return error
        finally:
            self._pages.finish_spills(are_written)
        return None

    def _restore(self, spill: Spill, room: BatchRoom) -> None:
        restores = self._pages.start_restores()
        if not any(restores):
            return
        self.apply_copies()  # of runs that were moved to make room
        for index, transfers in zip(tuple(room.ready), restores, strict=True):
            try:
                if transfers:
                    spill.read(transfers)
            except SpillError as error:
                room.ready.remove(index)
                room.failed[index] = error

    def apply_copies(self) -> None:
        """Make the page copies that were logged, in order; on the engine thread, before each batch."""
        has_copied = False
        while pairs := self._pages.take_copies(self._copy_limit):
            has_copied = True
            self._copy(self.kv, torch.frombuffer(pairs, dtype=torch.int32).view(-1, 2))
        if has_copied:
            self._report_copies()

    def _report_copies(self) -> None:
        stats = self._pages.stats()
        moved, shared = stats.pages_moved, stats.copies - stats.pages_moved
        known_moved, known_shared = self._known_copies
        self._known_copies = moved, shared
        self._observer.copied(shared - known_shared, moved - known_moved)

    def fill_origins(self, sessions: Sequence[KVSession], out: npt.NDArray[np.int32]) -> int:
        """Write the page table of a batch (see ``ops.ragged``) and return its number of rows.

        ``out``: ``[R, max_runs]``; rows are the sessions' rows in order, entries past a row's
        runs are left as they are. Raises SessionClosed when one of them is closed, KVPoolError when ``out`` is
        too small; ``out`` is untouched then.
        """
        return self._pages.fill_origins([session.handle for session in sessions], out)

    def stats(self) -> PoolStats:
        return self._pages.stats()

    def check_integrity(self) -> None:
        """Raise KVPoolError when the books do not balance. Walks all pages: for tests and idle times."""
        self._pages.check_integrity()
