"""KVPool: the device memory of the KV cache, and the pages that divide it among sessions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from petalsd._C import PagePool, PoolStats
from petalsd.errors import KVPoolError, PetalsdError
from petalsd.kvcache.session import KVRequest, KVSession
from petalsd.kvcache.sizing import KVGeometry
from petalsd.kvcache.waiting import WaitingRoom
from petalsd.ops.memory import empty
from petalsd.ops.ragged import PagedKV

# Page copies go through a temporary copy of their sources; this bounds it, for keys and values each.
_COPY_BUFFER_BYTES = 32 << 20


class KVPool:
    """``num_pages`` pages (page 0 is never used) of ``geometry``, in ``dtype`` on ``device``.

    ``reserve`` belongs to an event loop, ``apply_copies`` and ``fill_origins`` to the engine thread; before each
    batch it extends all the batch's sessions, then applies the copies, then fills the origins, which hold until it
    extends a session again.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        num_pages: int,
        dtype: torch.dtype,
        device: torch.device,
        max_waiters: int = 64,
    ) -> None:
        self.geometry = geometry
        self.num_pages = num_pages
        self.dtype = dtype
        self.device = device
        self._pages = PagePool(num_pages, geometry.page_tokens)
        self._waiting_room = WaitingRoom(self._pages, max_waiters)
        self._copy_limit = max(1, _COPY_BUFFER_BYTES // geometry.slab_page_bytes)
        self._kv: PagedKV | None = None

    def allocate(self) -> PagedKV:
        """Take the memory, of undefined content; on a CPU the system maps it as it is first written."""
        if self.dtype.itemsize != self.geometry.dtype_bytes:
            raise KVPoolError(f"{self.dtype} does not have {self.geometry.dtype_bytes} bytes")
        shape = (self.num_pages, *self.geometry.page_shape)
        self._kv = PagedKV(
            k=empty(shape, self.dtype, self.device),
            v=empty(shape, self.dtype, self.device),
        )
        return self._kv

    @property
    def kv(self) -> PagedKV:
        """The slab; its tensors never move."""
        if self._kv is None:
            raise KVPoolError("the pool has no memory yet: call allocate() first")
        return self._kv

    @property
    def tokens_free(self) -> int:
        """Tokens that new sessions could reserve, summed over blocks."""
        stats = self._pages.stats()
        return (stats.pages_total - stats.pages_reserved) * self.geometry.page_tokens

    async def reserve(self, request: KVRequest, timeout_s: float) -> KVSession:
        """Open a session that may grow to ``max_tokens``, waiting ``timeout_s`` for others to leave.

        Requests are served in the order they came. With a timeout of 0, or when the whole pool is too small, the
        answer comes at once. Raises OutOfPages with the numbers.
        """
        if timeout_s > 0:
            handle = await self._waiting_room.wait(request, timeout_s)
        else:
            handle = self._pages.try_open(
                request.first_block, request.num_blocks, request.batch, request.max_tokens
            )
        return KVSession(request, self._pages, handle, self._waiting_room.deliver)

    def dismiss_waiters(self, error: PetalsdError) -> None:
        """End every ``reserve`` that waits with ``error``; on any thread."""
        self._waiting_room.dismiss(error)

    def apply_copies(self) -> None:
        """Make the page copies that ``extend`` has logged, in order; on the engine thread, before each batch."""
        while pairs := self._pages.take_copies(self._copy_limit):
            copies = torch.frombuffer(pairs, dtype=torch.int32).view(-1, 2).to(self.device, torch.int64)
            sources, targets = copies.unbind(1)
            for slab in (self.kv.k, self.kv.v):
                slab.index_copy_(0, targets, slab.index_select(0, sources))

    def fill_origins(self, sessions: Sequence[KVSession], out: torch.Tensor) -> int:
        """Write the page table of a batch (see ``ops.ragged``) and return its number of rows.

        ``out``: ``[R, max_runs]`` int32 on the CPU; rows are the sessions' rows in order, entries past a row's
        runs are left as they are. Raises SessionClosed when one of them is closed, KVPoolError when ``out`` is
        too small; ``out`` is untouched then.
        """
        return self._pages.fill_origins([session.handle for session in sessions], out.numpy())

    def stats(self) -> PoolStats:
        return self._pages.stats()

    def check_integrity(self) -> None:
        """Raise KVPoolError when the books do not balance. Walks all pages: for tests and idle times."""
        self._pages.check_integrity()
