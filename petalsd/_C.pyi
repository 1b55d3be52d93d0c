"""The native part of petalsd, built from csrc/; tests/csrc/test_stub.py compares this file with the built module.

Every method may be called from any thread and releases the GIL; none of them waits for anything but a mutex
that is held for the length of one call. csrc/page_pool.hpp is the contract in full.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

class PoolStats:
    """Page counts are of physical pages, page 0 left out."""

    @property
    def pages_total(self) -> int: ...
    @property
    def pages_free(self) -> int:
        """Hold nothing, promised or not."""
    @property
    def pages_mapped(self) -> int:
        """Hold tokens of open sessions."""
    @property
    def pages_reserved(self) -> int:
        """Promised to open sessions, mapped pages included."""
    @property
    def pages_shared(self) -> int:
        """Mapped, in runs that several rows continue from."""
    @property
    def high_water(self) -> int:
        """Most pages mapped at once."""
    @property
    def sessions(self) -> int: ...
    @property
    def waiters(self) -> int: ...
    @property
    def copies(self) -> int:
        """Page copies ever asked for: copy on write, and moves."""
    @property
    def pages_moved(self) -> int:
        """How many of the copies made room for a run."""

class PagePool:
    """Credit and page tables of all sessions. Raises OutOfPages, SessionClosed (a closed handle) and KVPoolError
    (a call against the contract); a call that raises has changed nothing."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        """Pages 1 to ``num_pages - 1``; page 0 is never handed out."""
    def request(self, first_block: int, num_blocks: int, batch: int, max_tokens: int) -> int:
        """Queue for ``batch * ceil(max_tokens / page_tokens) * num_blocks`` pages, first come, first served; the
        handle can be used once ``granted`` has named it. OutOfPages at once when the whole pool is too small."""
    def try_open(self, first_block: int, num_blocks: int, batch: int, max_tokens: int) -> int:
        """A handle at once, or OutOfPages; also when the pages are there but others wait for them."""
    def granted(self) -> list[int]:
        """The requests granted since the last call, in order; to be asked after ``request`` and ``close``."""
    def extend(self, handle: int, length: int) -> None:
        """Map pages so that every row covers ``length`` tokens; rows get their own copies of a shared last run
        that is partly filled. Never runs out. May move the runs of any session: see ``take_copies``."""
    def truncate(self, handle: int, length: int) -> None:
        """Roll every row back to ``length`` tokens and drop the runs past it."""
    def reorder(self, handle: int, hypo_ids: Sequence[int]) -> None:
        """Row j continues from old row ``hypo_ids[j]``; takes no pages and copies nothing."""
    def take_copies(self, limit: int) -> bytearray:
        """The next group of pending page copies, at most ``limit`` int32 pairs (source, target), to be made
        before the next batch and before the next group. Within a group no page is read or written after it was
        written, so all sources may be read before the targets are written. Empty when nothing is left."""
    def fill_origins(self, handles: Sequence[int], out: NDArray[np.int32]) -> int:
        """Write one row of ``out`` ([R, max_runs]) per row of the sessions, in order: entry j is the first page of
        the row's run j minus the session's first block; entries past its runs are left alone. The number of
        rows written. The table holds until the next ``extend`` of any session."""
    def length(self, handle: int) -> int:
        """Tokens of each row."""
    def close(self, handle: int) -> None:
        """Give pages and credit back, or withdraw the request; nothing when it was closed before."""
    def stats(self) -> PoolStats: ...
    def check_integrity(self) -> None:
        """Raise KVPoolError with both sides of the first equation that does not hold."""

class ThreadTeam:
    """A few threads that share the work of their caller; they sleep when there is none."""

    def __init__(self, num_threads: int) -> None:
        """``num_threads`` counts the caller."""
    @property
    def num_threads(self) -> int: ...

class DecodeRows:
    """R rows with one new token each: addresses of tensors that the caller keeps alive."""

    def __init__(
        self,
        num_rows: int,
        k_v_cos_sin: Sequence[int],
        page_tokens: int,
        origins: int,
        origins_stride: int,
        positions: int,
    ) -> None:
        """k and v ``[N, P, Hkv, D]``, cos and sin ``[R, D]`` in the block's dtype; origins ``[R, stride]`` int32
        as in ``ops.ragged``; positions ``[R]`` int64."""

class DecodeBlock:
    """One transformer block for decode steps on the CPU."""

    def __init__(
        self,
        index: int,
        sizes: Sequence[int],
        norm_eps: float,
        weights: Sequence[int],
        is_bfloat16: bool,
        tier: str,
    ) -> None:
        """sizes: hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, window (0: none). weights:
        addresses, or 0, of input_norm, qkv, qkv_bias, q_norm, k_norm, output, output_bias, mlp_norm, gate_up,
        gate_up_bias, down, down_bias. tier: ``auto``, ``baseline``, ``avx2``, ``avx512`` or ``avx512bf16``."""
    @property
    def tier(self) -> str:
        """Whose kernels it runs."""

class DecodeSpan:
    """Consecutive blocks in one call, with float32 between them; one call at a time."""

    def __init__(self, blocks: Sequence[DecodeBlock]) -> None:
        """In order, all of the same sizes, dtype and tier."""
    def run(self, rows: DecodeRows, first: int, count: int, hidden: int, out: int, team: ThreadTeam) -> None:
        """Write K and V of the new tokens in ``count`` blocks from number ``first``, and ``[R, M]`` to ``out``;
        hidden and out are addresses, of tensors in the blocks' dtype."""
