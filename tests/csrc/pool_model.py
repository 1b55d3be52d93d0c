"""The page pool in a few lines of Python, and a fake slab that holds what the rows wrote: the tests' oracle."""

from __future__ import annotations

import tempfile
from typing import NamedTuple

import numpy as np

from petalsd._C import PagePool, SpillFile

LARGEST_LIMIT = 1 << 20


class Shape(NamedTuple):
    first_block: int
    num_blocks: int
    batch: int
    max_tokens: int


class ModelSession:
    """``rows`` holds the tokens of each row, ``runs`` an object per run; rows that share it name the same one."""

    def __init__(self, shape: Shape, page_tokens: int) -> None:
        self.shape = shape
        self.page_tokens = page_tokens
        self.credit = shape.batch * -(-shape.max_tokens // page_tokens) * shape.num_blocks
        self.rows: list[list[int]] = [[] for _ in range(shape.batch)]
        self.runs: list[list[object]] = [[] for _ in range(shape.batch)]

    @property
    def length(self) -> int:
        return len(self.rows[0])

    @property
    def is_shared(self) -> bool:
        """Whether two rows have a run in common."""
        return len({run for row in self.runs for run in row}) < sum(map(len, self.runs))

    @property
    def held(self) -> int:
        return len({run for row in self.runs for run in row}) * self.shape.num_blocks

    @property
    def tail_tokens(self) -> int:
        last_runs = {row[-1] for row in self.runs if row}
        return len(last_runs) * (-self.length % self.page_tokens) * self.shape.num_blocks

    def extend(self, length: int) -> None:
        num_runs = -(-length // self.page_tokens)
        for number, row in enumerate(self.runs):
            others = [run for other in self.runs[:number] + self.runs[number + 1 :] for run in other]
            if length > self.length and self.length % self.page_tokens and row[-1] in others:
                row[-1] = object()
            row.extend(object() for _ in range(num_runs - len(row)))

    def truncate(self, length: int) -> None:
        self.rows = [row[:length] for row in self.rows]
        self.runs = [row[: -(-length // self.page_tokens)] for row in self.runs]

    def reorder(self, hypo_ids: list[int]) -> None:
        self.rows = [list(self.rows[old]) for old in hypo_ids]
        self.runs = [list(self.runs[old]) for old in hypo_ids]


class FakeEngine:
    """Drives a pool as the engine does, the model beside it; every token of every block has its own number.

    With ``spill_pages`` the pool has a real spill file of so many.
    """

    def __init__(self, num_pages: int, page_tokens: int, spill_pages: int = 0) -> None:
        self.slab = np.full((num_pages, page_tokens), -1, dtype=np.int64)
        self.page_bytes = page_tokens * self.slab.itemsize
        self.file = SpillFile(tempfile.gettempdir(), spill_pages * self.page_bytes, 0)
        self.file.open(self.page_bytes)
        self.pool = PagePool(num_pages, page_tokens, self.file if spill_pages else None, bypass_wait_s=0)
        self.page_tokens = page_tokens
        self.num_pages = num_pages - 1
        self.capacity = max(num_pages - 1, spill_pages)
        self.open: dict[int, ModelSession] = {}
        self.waiting: dict[int, ModelSession] = {}
        self.next_token = 0

    @property
    def unreserved(self) -> int:
        return self.capacity - sum(session.credit for session in self.open.values())

    def try_open(self, shape: Shape) -> int:
        handle = self.pool.try_open(*shape)
        self.open[handle] = ModelSession(shape, self.page_tokens)
        return handle

    def request(self, shape: Shape) -> int:
        handle = self.pool.request(*shape)
        self.waiting[handle] = ModelSession(shape, self.page_tokens)
        self.expect_grants()
        return handle

    def close(self, handle: int) -> None:
        self.pool.close(handle)
        self.open.pop(handle, None)
        self.waiting.pop(handle, None)
        self.expect_grants()

    def expect_grants(self) -> None:
        expected = []
        while self.waiting:
            handle, session = next(iter(self.waiting.items()))
            if session.credit > self.unreserved:
                break
            self.open[handle] = self.waiting.pop(handle)
            expected.append(handle)
        assert self.pool.granted() == expected

    def truncate(self, handle: int, length: int) -> None:
        self.pool.truncate(handle, length)
        self.open[handle].truncate(length)

    def reorder(self, handle: int, hypo_ids: list[int]) -> None:
        self.pool.reorder(handle, hypo_ids)
        self.open[handle].reorder(hypo_ids)

    def step(self, tokens: dict[int, int], copy_limit: int = LARGEST_LIMIT) -> None:
        """``tokens[handle]`` new tokens in every row of each session, in as many batches as the memory wants."""
        while tokens:
            batch = self.make_room(
                {handle: self.open[handle].length + count for handle, count in tokens.items()}
            )
            assert batch, "nobody fits"
            for handle in batch:
                length = self.open[handle].length + tokens[handle]
                self.pool.extend(handle, length)
                self.open[handle].extend(length)
            self.apply_copies(copy_limit)
            for handle in batch:
                self.write(handle, tokens[handle])
            tokens = {handle: count for handle, count in tokens.items() if handle not in batch}

    def make_room(self, lengths: dict[int, int]) -> list[int]:
        """Those who are in memory afterwards, with room for so many tokens."""
        if self.capacity == self.num_pages:
            return list(lengths)
        self.apply_copies()
        handles = list(lengths)
        chosen, spills = self.pool.plan_batch(handles, list(lengths.values()), may_spill=True)
        place = [(self.slab.ctypes.data, self.page_bytes)]
        self.file.write(spills, place)
        self.pool.finish_spills(are_written=True)
        restores = self.pool.start_restores()
        self.apply_copies()
        for transfers in restores:
            self.file.read(transfers, place)
        return [handles[index] for index in chosen]

    def abandoned_step(self, handle: int, count: int) -> None:
        """A batch that failed before it began: its copies stay pending, its tokens are rolled back."""
        length = self.open[handle].length
        assert self.make_room({handle: length + count}) == [handle]
        self.pool.extend(handle, length + count)
        self.open[handle].extend(length + count)
        self.truncate(handle, length)

    def overwrite(self, handle: int, start: int, end: int) -> None:
        """Other tokens in the place of these, in all rows; the session's rows must share nothing."""
        session = self.open[handle]
        assert self.make_room({handle: session.length}) == [handle]
        self.apply_copies()
        origins = self.origins(handle)
        self.pool.overwrite(handle, start, end)
        for row in range(session.shape.batch):
            for position in range(start, end):
                self.write_token(session, origins, row, position)

    def apply_copies(self, limit: int = LARGEST_LIMIT) -> None:
        """Group by group as a device does it, and one by one beside it: both must come to the same."""
        one_by_one = self.slab.copy()
        while pairs := self.pool.take_copies(limit):
            sources, targets = np.frombuffer(pairs, dtype=np.int32).reshape(-1, 2).T
            assert len(sources) <= limit
            assert len(set(targets)) == len(targets), "a page is written twice in a group"
            self.slab[targets] = self.slab[sources]
            for source, target in zip(sources, targets, strict=True):
                one_by_one[target] = one_by_one[source]
        np.testing.assert_array_equal(self.slab, one_by_one)

    def origins(self, handle: int) -> np.ndarray:
        session = self.open[handle]
        out = np.full(
            (session.shape.batch, max(1, -(-session.shape.max_tokens // self.page_tokens))), -1, np.int32
        )
        assert self.pool.fill_origins([handle], out) == session.shape.batch
        return out

    def write(self, handle: int, count: int) -> None:
        session, origins = self.open[handle], self.origins(handle)
        for row, tokens in enumerate(session.rows):
            for position in range(len(tokens), len(tokens) + count):
                self.write_token(session, origins, row, position)

    def write_token(self, session: ModelSession, origins: np.ndarray, row: int, position: int) -> None:
        for block in blocks(session.shape):
            page = origins[row, position // self.page_tokens] + block
            self.slab[page, position % self.page_tokens] = content(self.next_token, block)
        session.rows[row][position : position + 1] = [self.next_token]
        self.next_token += 1

    def check_contents(self) -> None:
        """Make the pending copies; then every row of every session reads the tokens it wrote or continued from."""
        self.apply_copies()
        for handle, session in self.open.items():
            assert self.make_room({handle: session.length}) == [handle]
            origins = self.origins(handle)
            for row, tokens in enumerate(session.rows):
                for block in blocks(session.shape):
                    pages = self.slab[origins[row, : -(-len(tokens) // self.page_tokens)] + block]
                    read = pages.reshape(-1)[: len(tokens)].tolist()
                    assert read == [content(token, block) for token in tokens], (handle, row, block)

    def check_books(self) -> None:
        self.pool.check_integrity()
        stats = self.pool.stats()
        assert (stats.pages_total, stats.pages_promisable) == (self.num_pages, self.capacity)
        assert stats.pages_mapped + stats.pages_spilled == sum(session.held for session in self.open.values())
        assert stats.pages_free == self.num_pages - stats.pages_mapped
        assert stats.pages_reserved == self.capacity - self.unreserved
        assert stats.tail_tokens == sum(session.tail_tokens for session in self.open.values())
        assert (stats.sessions, stats.waiters) == (len(self.open), len(self.waiting))
        assert all(self.pool.length(handle) == session.length for handle, session in self.open.items())


def blocks(shape: Shape) -> range:
    return range(shape.first_block, shape.first_block + shape.num_blocks)


def content(token: int, block: int) -> int:
    return token * 1000 + block
