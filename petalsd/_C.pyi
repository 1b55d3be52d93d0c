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
    def pages_promisable(self) -> int:
        """All credit that there is, promised or not: the pages in memory, or of the spill file if it has more."""
    @property
    def pages_reserved(self) -> int:
        """Promised to open sessions, whether they hold tokens yet or not."""
    @property
    def pages_total(self) -> int:
        """In memory."""
    @property
    def pages_free(self) -> int:
        """Of them hold nothing, promised or not."""
    @property
    def pages_mapped(self) -> int:
        """Of them hold tokens of open sessions."""
    @property
    def pages_spilled(self) -> int:
        """Hold tokens in the spill file alone."""
    @property
    def pages_shared(self) -> int:
        """Hold tokens, in runs that several rows continue from."""
    @property
    def high_water(self) -> int:
        """Most pages mapped at once."""
    @property
    def tail_tokens(self) -> int:
        """Places for a token in a block that are held and empty: the ends of last pages."""
    @property
    def sessions(self) -> int: ...
    @property
    def waiters(self) -> int: ...
    @property
    def oldest_wait_s(self) -> float:
        """Of those who wait; 0 when nobody does."""
    @property
    def copies(self) -> int:
        """Page copies ever asked for: copy on write, and moves."""
    @property
    def pages_moved(self) -> int:
        """How many of the copies made room for a run."""
    @property
    def pages_evicted(self) -> int:
        """That ever left the memory for others."""
    @property
    def pages_restored(self) -> int:
        """That ever came back."""

class SpillFile:
    """The file for pages of idle sessions: without a name, mode 0600, never sparse. Raises SpillError with the
    system's reason. ``read`` and ``write`` belong to one thread, and ``close`` comes after them.

    A slot of it holds one page. ``transfers`` are int32 triples (page, slot, pages): so many pages of memory, and
    slots of the file, from there on. ``slabs`` are pairs (address, bytes of a page), one for each part of a page,
    in the same order every time; the caller keeps them alive."""

    def __init__(self, directory: str, max_bytes: int, keep_free_bytes: int) -> None:
        """At most ``max_bytes``, and only as long as the file system keeps ``keep_free_bytes`` beside it."""
    def open(self, page_bytes: int, pages_elsewhere: int = 0) -> None:
        """Make the file, of slots of ``page_bytes``; none where it may have no bytes. The first
        ``pages_elsewhere`` pages that are promised lie in other memory, even if the file cannot be made."""
    def write(self, transfers: bytearray, slabs: Sequence[tuple[int, int]]) -> None: ...
    def read(self, transfers: bytearray, slabs: Sequence[tuple[int, int]]) -> None: ...
    def grow_to(self, pages: int) -> int:
        """Allocate room for ``pages`` pages if that is possible; for how many there is room now."""
    def allocated_bytes(self) -> int: ...
    def close(self) -> None:
        """Give the disk back; nothing can be stored any more."""

class PagePool:
    """Credit, residency and page tables of all sessions. Raises OutOfPages, SessionClosed (a closed handle) and
    KVPoolError (a call against the contract); a call that raises has changed nothing."""

    def __init__(
        self,
        num_pages: int,
        page_tokens: int,
        spill_file: SpillFile | None = None,
        max_peer_share: float = 1.0,
        bypass_wait_s: float = 2.0,
        max_bypasses: int = 8,
    ) -> None:
        """Pages 1 to ``num_pages - 1`` in memory; page 0 is never handed out. A peer that holds credit gets no
        more than its share of all; who has waited ``bypass_wait_s`` or was passed ``max_bypasses`` times is not
        passed."""
    def request(self, first_block: int, num_blocks: int, batch: int, max_tokens: int, peer: str = "") -> int:
        """Queue for ``batch * ceil(max_tokens / page_tokens) * num_blocks`` pages; the handle can be used once
        ``granted`` has named it. OutOfPages at once when the memory is too small. No bound for an empty peer."""
    def try_open(self, first_block: int, num_blocks: int, batch: int, max_tokens: int, peer: str = "") -> int:
        """A handle at once, or OutOfPages; also when others wait who may not be passed."""
    def charge(self, handle: int, peer: str) -> None:
        """Count an open session to the share of ``peer`` from now on; OutOfPages when it may not hold as much."""
    def granted(self) -> list[int]:
        """The requests granted since the last call, in order; to be asked after ``request``, ``try_open``,
        ``close`` and ``charge``."""
    def plan_batch(
        self, handles: Sequence[int], lengths: Sequence[int], may_spill: bool
    ) -> tuple[list[int], bytearray]:
        """Which sessions, by index, run in the next batch and can be extended to ``lengths`` in it, and the
        transfers that must be written to the spill file for it. The others' turn is the batch after it. Without
        ``may_spill`` nothing is written, and fewer may fit. A closed handle is chosen. Copies must have been made
        before."""
    def finish_spills(self, are_written: bool) -> None:
        """The plan's transfers are in the file; or they could not be written, and their pages stay in memory."""
    def start_restores(self) -> list[bytearray]:
        """For each chosen session the transfers that must be read back before it runs, after the copies were
        made."""
    def extend(self, handle: int, length: int) -> None:
        """Map pages so that every row covers ``length`` tokens; rows get their own copies of a shared last run
        that is partly filled. Never runs out, once ``plan_batch`` has chosen the session for that length. May move
        the runs of any session: see ``take_copies``."""
    def truncate(self, handle: int, length: int) -> None:
        """Roll every row back to ``length`` tokens and drop the runs past it."""
    def reorder(self, handle: int, hypo_ids: Sequence[int]) -> None:
        """Row j continues from old row ``hypo_ids[j]``; takes no pages and copies nothing."""
    def overwrite(self, handle: int, start: int, end: int) -> None:
        """Tokens ``start`` to ``end - 1`` of every row, which are in memory and not shared, get other content
        without a step: what the spill file holds of them is out of date."""
    def take_copies(self, limit: int) -> bytearray:
        """The next group of pending page copies, at most ``limit`` int32 pairs (source, target), to be made
        before the next batch and before the next group. Within a group no page is read or written after it was
        written, so all sources may be read before the targets are written. Empty when nothing is left."""
    def fill_origins(self, handles: Sequence[int], out: NDArray[np.int32]) -> int:
        """Write one row of ``out`` ([R, max_runs]) per row of the sessions, in order: entry j is the first page of
        the row's run j minus the session's first block; entries past its runs are left alone. The number of
        rows written. The table holds until the next ``extend`` or plan of any session."""
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

class PackedWeight:
    """A weight in the order of ``ops.packed_weight``: addresses of tensors that the caller keeps alive."""

    def __init__(self, format: str, num_out: int, num_in: int, data: int, scales: int) -> None:
        """format: ``float32``, ``bfloat16``, ``int8`` or ``int4``; scales: 0 where it has none."""

class KVPages:
    """Keys and values in the order of ``ops.head_major``: addresses of tensors that the caller keeps alive."""

    def __init__(
        self, type: str, k_v_scales: Sequence[int], page_tokens: int, num_kv_heads: int, head_dim: int
    ) -> None:
        """type: ``float32``, ``bfloat16`` or ``int8``; the addresses of k, v, k_scales and v_scales, or 0."""

class StepRows:
    """R new tokens of some sequences, one sequence after the other; the caller keeps the tensors alive."""

    def __init__(
        self,
        dtype: str,
        bounds: Sequence[int],
        cos_sin_positions: Sequence[int],
        origins: int,
        origins_stride: int,
        kv: KVPages,
    ) -> None:
        """dtype: of states, cos and sin, ``float32`` or ``bfloat16``. Sequence s has the rows ``bounds[s]`` to
        ``bounds[s + 1] - 1``. Addresses of cos and sin ``[R, D]``, positions ``[R]`` int64 and origins
        ``[S, stride]`` int32 as in ``ops.ragged``."""

class SpanBlock:
    """One transformer block for steps on the CPU."""

    def __init__(
        self,
        index: int,
        sizes: Sequence[int],
        norm_eps: float,
        matrices: Sequence[PackedWeight],
        vectors: Sequence[Sequence[float]],
        tier: str,
    ) -> None:
        """sizes: hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, window (0: none). matrices:
        qkv, output, gate_up, down. vectors: input_norm, mlp_norm, q_norm, k_norm, qkv_bias, output_bias,
        gate_up_bias, down_bias, empty where there is none. tier: ``auto`` or a name of ``csrc/tiers.cpp``."""
    @property
    def tier(self) -> str:
        """Whose kernels it runs."""

class Span:
    """Consecutive blocks in one call, with float32 between them; one call at a time."""

    def __init__(self, blocks: Sequence[SpanBlock]) -> None:
        """In order, all of the same sizes and tier."""
    def run(self, rows: StepRows, first: int, count: int, hidden: int, out: int, team: ThreadTeam) -> None:
        """Write K and V of the new tokens in ``count`` blocks from number ``first``, and ``[R, M]`` to ``out``;
        hidden and out are addresses, of tensors in the rows' dtype."""

class Sequences:
    """New tokens of some sequences, one sequence after the other; the caller keeps the tensors alive."""

    def __init__(self, bounds: Sequence[int], positions: int, origins: int, origins_stride: int) -> None:
        """Sequence s has the rows ``bounds[s]`` to ``bounds[s + 1] - 1``. Addresses of positions ``[R]`` int64 and
        origins ``[S, stride]`` int32 as in ``ops.ragged``."""

class ScoreRule:
    """What happens to scores, as ``ops.score_rule`` has it; the caller keeps the tensors alive."""

    def __init__(
        self, softcap: float, slopes: int, bias_factor: float, rounds_biases: bool, sinks: int
    ) -> None:
        """softcap: 0 for none; slopes and sinks: addresses of float32 ``[H]``, or 0. With ``rounds_biases``
        positions, and products of slopes with them, are rounded to bfloat16."""

class GatedExperts:
    """Gated experts of a block; the caller keeps their tensors alive."""

    def __init__(
        self,
        gate_up: Sequence[PackedWeight],
        down: Sequence[PackedWeight],
        biases: Sequence[int],
        clamp: tuple[float, float] | None,
    ) -> None:
        """``[2 * I, M]``, gate above up, and ``[M, I]`` of each, in one format.

        biases: addresses of float32 ``[E, 2 * I]`` and ``[E, M]``, or 0 for none. clamp: limit and alpha of
        ``ops.expert_gate.ClampedGate``; without it SiLU gates."""

class LayerRows:
    """What goes through a part of a layer, and what comes of it; the caller keeps the tensors alive."""

    def __init__(self, inputs: int, outputs: int, num_rows: int, is_bfloat16: bool) -> None:
        """Addresses of contiguous rows, bfloat16 or else float32."""

class RowNorm:
    """A root-mean-square norm; the caller keeps its weight alive."""

    def __init__(self, weight: int, width: int, eps: float) -> None:
        """Address of what rows are multiplied by, float32 ``[width]``."""

class LayerTeam:
    """A few threads that compute products, norms and attention by themselves.

    A call waits for one that is running."""

    def __init__(self, num_threads: int, tier: str) -> None:
        """``num_threads`` counts the caller."""
    @property
    def tier(self) -> str:
        """Whose kernels it runs."""
    def multiply(self, weight: PackedWeight, bias: int, rows: LayerRows) -> None:
        """Rows ``[R, num_in]`` times the weight to ``[R, num_out]``; float32 ones are not rounded beside bfloat16
        weights, which is slower for many rows. bias: address of float32 ``[num_out]``, or 0."""
    def normalize(self, norm: RowNorm, rows: LayerRows) -> None:
        """Rows ``[R, width]``, each by itself."""
    def run_experts(
        self, experts: GatedExperts, sizes: Sequence[int], experts_shares_in_out: Sequence[int], is_wide: bool
    ) -> None:
        """The sum of ``share * expert(in)`` over the experts of each token, in their order, to ``out``.

        sizes: T tokens and k experts of each. Addresses: which experts ``[T, k]`` int64; float32: shares
        ``[T, k]``, in and out ``[T, M]``. ``is_wide`` as for ``multiply``."""
    def attend(
        self,
        sequences: Sequences,
        kv: KVPages,
        sizes: Sequence[int],
        scale: float,
        rule: ScoreRule,
        q_k_v_out: Sequence[int],
    ) -> None:
        """Write K and V of the new tokens in one block, and what they attend to, window and all, to ``out``.

        sizes: number of the block, heads, window (0: none). Addresses of float32 tensors: q and out ``[R, H, D]``,
        k and v ``[R, Hkv, D]``."""

def pack_weight(rows: Sequence[tuple[int, str, int, int]], weight: PackedWeight, tier: str) -> None:
    """Write finite weights to the memory of ``weight``, of which they are all rows, on the calling thread alone.

    rows: parts, one below the other, by address, dtype (float32, bfloat16, float16), elements from row to row, and
    number of rows. ``tier`` rounds to int4.
    """

def unpack_weight(weight: PackedWeight, dtype: str, out: int, num_threads: int) -> None:
    """All rows of a weight, padded as it is, to ``[16 * tiles, padded num_in]`` in float32 or bfloat16."""
