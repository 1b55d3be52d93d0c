"""The page pool in a few lines of Python, and a fake slab that holds what the rows wrote: the tests' oracle."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from petalsd._C import PagePool

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
    def mapped(self) -> int:
        return len({run for row in self.runs for run in row}) * self.shape.num_blocks

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
    """Drives a pool as the engine does, the model beside it; every token of every block has its own number."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        self.pool = PagePool(num_pages, page_tokens)
        self.page_tokens = page_tokens
        self.capacity = num_pages - 1
        self.slab = np.full((num_pages, page_tokens), -1, dtype=np.int64)
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
        """One batch: ``tokens[handle]`` new tokens in every row of each session."""
        for handle, count in tokens.items():
            length = self.open[handle].length + count
            self.pool.extend(handle, length)
            self.open[handle].extend(length)
        self.apply_copies(copy_limit)
        for handle, count in tokens.items():
            self.write(handle, count)

    def abandoned_step(self, handle: int, count: int) -> None:
        """A batch that failed before it began: its copies stay pending, its tokens are rolled back."""
        length = self.open[handle].length
        self.pool.extend(handle, length + count)
        self.open[handle].extend(length + count)
        self.truncate(handle, length)

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
                for block in blocks(session.shape):
                    page = origins[row, position // self.page_tokens] + block
                    self.slab[page, position % self.page_tokens] = content(self.next_token, block)
                tokens.append(self.next_token)
                self.next_token += 1

    def check_contents(self) -> None:
        """Make the pending copies; then every row of every session reads the tokens it wrote or continued from."""
        self.apply_copies()
        for handle, session in self.open.items():
            origins = self.origins(handle)
            for row, tokens in enumerate(session.rows):
                for block in blocks(session.shape):
                    pages = self.slab[origins[row, : -(-len(tokens) // self.page_tokens)] + block]
                    read = pages.reshape(-1)[: len(tokens)].tolist()
                    assert read == [content(token, block) for token in tokens], (handle, row, block)

    def check_books(self) -> None:
        self.pool.check_integrity()
        stats = self.pool.stats()
        mapped = sum(session.mapped for session in self.open.values())
        assert stats.pages_total == self.capacity
        assert stats.pages_mapped == mapped
        assert stats.pages_free == self.capacity - mapped
        assert stats.pages_reserved == self.capacity - self.unreserved
        assert (stats.sessions, stats.waiters) == (len(self.open), len(self.waiting))
        assert all(self.pool.length(handle) == session.length for handle, session in self.open.items())


def blocks(shape: Shape) -> range:
    return range(shape.first_block, shape.first_block + shape.num_blocks)


def content(token: int, block: int) -> int:
    return token * 1000 + block
