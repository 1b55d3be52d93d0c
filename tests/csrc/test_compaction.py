"""Runs of different lengths scatter the free pages; the pool moves runs together and nobody notices."""

from __future__ import annotations

import numpy as np
import pytest

from tests.csrc.pool_model import FakeEngine, Shape


def open_one_run(engine: FakeEngine, num_blocks: int) -> int:
    """A session whose single run is mapped and written."""
    handle = engine.try_open(Shape(0, num_blocks, batch=1, max_tokens=engine.page_tokens))
    engine.step({handle: engine.page_tokens})
    return handle


def first_page(engine: FakeEngine, handle: int) -> int:
    return int(engine.origins(handle)[0, 0]) + engine.open[handle].shape.first_block


def pending_pairs(engine: FakeEngine) -> list[tuple[int, int]]:
    pairs = np.frombuffer(engine.pool.take_copies(1 << 20), dtype=np.int32).reshape(-1, 2)
    return [(int(source), int(target)) for source, target in pairs]


def test_scattered_single_pages_become_one_run() -> None:
    """Every second page is free and a run as long as all of them together still fits."""
    engine = FakeEngine(num_pages=21, page_tokens=2)
    sessions = [open_one_run(engine, num_blocks=1) for _ in range(20)]
    for handle in sessions[::2]:
        engine.close(handle)
    wide = open_one_run(engine, num_blocks=10)
    engine.check_contents()
    engine.check_books()
    assert engine.pool.stats().pages_free == 0
    assert first_page(engine, wide) == 10


def test_no_run_moves_while_a_gap_is_long_enough() -> None:
    """A run goes into a gap that holds it; moving is the last resort."""
    engine = FakeEngine(num_pages=12, page_tokens=1)
    left, gap, right = (open_one_run(engine, blocks) for blocks in (2, 3, 2))
    engine.close(gap)
    open_one_run(engine, num_blocks=3)
    assert engine.pool.stats().pages_moved == 0
    assert {left, right} < set(engine.open)


def test_the_shortest_gap_that_fits_is_taken() -> None:
    """A short run leaves the long gap to a long run."""
    engine = FakeEngine(num_pages=12, page_tokens=1)
    long_gap, _, short_gap, _ = (open_one_run(engine, blocks) for blocks in (5, 1, 2, 3))
    engine.close(long_gap)
    engine.close(short_gap)
    short = open_one_run(engine, num_blocks=2)
    assert first_page(engine, short) == 7
    open_one_run(engine, num_blocks=5)
    assert engine.pool.stats().pages_moved == 0


def test_the_cheapest_neighbourhood_is_moved() -> None:
    """Between a long and a short run that separate gaps, the short one is moved."""
    engine = FakeEngine(num_pages=21, page_tokens=1)
    #  1 gap, 2-9 long run, 10-12 gap, 13-14 short run, 15-17 gap, 18-20 last run
    gaps = []
    for blocks, is_gap in ((1, True), (8, False), (3, True), (2, False), (3, True), (3, False)):
        handle = open_one_run(engine, blocks)
        if is_gap:
            gaps.append(handle)
    for handle in gaps:
        engine.close(handle)
    wide = open_one_run(engine, num_blocks=6)
    assert engine.pool.stats().pages_moved == 2
    assert first_page(engine, wide) == 12
    engine.check_contents()


def test_a_run_slides_down_onto_itself() -> None:
    """A move by less than the run's length copies page by page upwards, so nothing is overwritten unread."""
    engine = FakeEngine(num_pages=8, page_tokens=1)
    gap, run, tail = (open_one_run(engine, blocks) for blocks in (1, 5, 1))
    engine.close(gap)
    engine.close(tail)
    wide = engine.try_open(Shape(0, 2, 1, 1))
    engine.pool.extend(wide, 1)
    assert pending_pairs(engine) == [(page, page - 1) for page in range(2, 7)]
    assert first_page(engine, run) == 1


def copied_then_moved() -> FakeEngine:
    """An engine with pending copies: page 2 to 3 on write, then both of them down to 1 and 2 to make room."""
    engine = FakeEngine(num_pages=7, page_tokens=2)
    narrow = open_one_run(engine, num_blocks=1)  # page 1
    beams = engine.try_open(Shape(0, 1, batch=2, max_tokens=2))
    engine.step({beams: 1})  # pages 2 and 3
    engine.reorder(beams, [0, 0])  # page 3 is free
    engine.abandoned_step(beams, 1)
    engine.close(narrow)
    wide = engine.try_open(Shape(0, 4, batch=1, max_tokens=2))
    engine.abandoned_step(wide, 2)
    return engine


def test_a_copy_on_write_may_move_before_it_is_made() -> None:
    """A page that a pending copy writes is read only in a later group of copies."""
    engine = copied_then_moved()
    assert pending_pairs(engine) == [(2, 3), (2, 1)]
    assert pending_pairs(engine) == [(3, 2)]
    assert pending_pairs(engine) == []


def test_what_was_copied_and_moved_is_read_back() -> None:
    """Both rows have their tokens after the copy of one of them was moved with its source."""
    engine = copied_then_moved()
    engine.check_contents()
    engine.check_books()


def test_a_freed_source_is_reused_while_its_copy_is_pending() -> None:
    """The page of a pending copy's source goes to another session, whose tokens come only after the copy."""
    engine = FakeEngine(num_pages=5, page_tokens=2)
    beams = engine.try_open(Shape(0, 1, batch=2, max_tokens=2))
    engine.step({beams: 1})
    engine.reorder(beams, [0, 0])
    engine.pool.extend(beams, 2)
    engine.open[beams].extend(2)
    engine.truncate(beams, 1)
    engine.reorder(beams, [0, 0])  # the source, kept by row 1, is dropped for row 0's copy
    newcomer = engine.try_open(Shape(0, 2, batch=1, max_tokens=2))
    engine.step({newcomer: 2})
    engine.check_contents()
    engine.check_books()


def test_a_page_written_twice_is_in_two_groups() -> None:
    """A dropped target of a pending copy becomes the target of another copy, which comes in a later group."""
    engine = FakeEngine(num_pages=4, page_tokens=2)
    beams = engine.try_open(Shape(0, 1, batch=3, max_tokens=2))
    engine.step({beams: 1})
    engine.reorder(beams, [0, 0, 1])  # row 2 is in page 2, page 3 is free
    engine.abandoned_step(beams, 1)  # row 0 copies page 1 to 3
    engine.reorder(beams, [2, 2, 1])  # row 0's copy is dropped
    engine.abandoned_step(beams, 1)  # row 0 copies page 2 to 3
    assert pending_pairs(engine) == [(1, 3)]
    assert pending_pairs(engine) == [(2, 3)]


def test_rows_that_share_a_run_move_together() -> None:
    """A shared run is moved once, and all its rows follow."""
    engine = FakeEngine(num_pages=10, page_tokens=2)
    gap = open_one_run(engine, num_blocks=1)
    beams = engine.try_open(Shape(0, 2, batch=3, max_tokens=2))
    engine.step({beams: 2})
    engine.reorder(beams, [0, 0, 0])
    engine.close(gap)
    assert engine.pool.stats().pages_shared == 2
    open_one_run(engine, num_blocks=3)
    engine.check_contents()
    assert len(set(engine.origins(beams)[:, 0])) == 1


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 7])
def test_a_full_pool_serves_every_admitted_session_to_its_end(num_blocks: int) -> None:
    """Sessions admitted to the last page grow to their max_tokens in any interleaving, with beams in between."""
    engine = FakeEngine(num_pages=85, page_tokens=2)
    widths = [num_blocks, 1, 5, 2]
    while True:
        for width in widths:
            if width * 6 <= engine.unreserved:
                engine.try_open(Shape(0, width, batch=2, max_tokens=6))
        if min(widths) * 6 > engine.unreserved:
            break
    for _ in range(6):
        for handle in list(engine.open):
            engine.step({handle: 1})
        for handle in list(engine.open)[::2]:
            engine.reorder(handle, [1, 1])
        engine.check_contents()
        engine.check_books()
    assert all(session.length == session.shape.max_tokens for session in engine.open.values())
