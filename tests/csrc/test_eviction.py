"""Pages of beams leave the memory: a run that rows share goes once, however many they are and however long."""

from __future__ import annotations

import tempfile
import time

import numpy as np
import pytest

from petalsd._C import PagePool, SpillFile
from tests.csrc.pool_model import FakeEngine, Shape


def evict(rows: int, runs: int) -> tuple[float, int]:
    """Seconds to plan a batch that takes all pages of ``rows`` rows of the same ``runs`` runs; pages it spills."""
    file = SpillFile(tempfile.gettempdir(), 2 * rows * runs, 0)
    file.open(1)
    pool = PagePool(1 + rows * runs, 1, file, bypass_wait_s=0)
    beams, other = pool.try_open(0, 1, rows, runs), pool.try_open(0, 1, 1, rows * runs)
    pool.plan_batch([beams], [runs], may_spill=True)
    pool.start_restores()
    pool.extend(beams, runs)
    pool.reorder(beams, [0] * rows)
    started = time.perf_counter()
    chosen, spills = pool.plan_batch([other], [rows * runs], may_spill=True)
    seconds = time.perf_counter() - started
    assert chosen == [0]
    return seconds, int(np.frombuffer(spills, dtype=np.int32).reshape(-1, 3)[:, 2].sum())


def test_shared_runs_leave_in_time_that_grows_with_their_number() -> None:
    """Four rows of the same 60,000 runs take a few times as long as one row of them, not hundreds of times."""
    alone, _ = min(evict(1, 60_000) for _ in range(3))
    shared, pages = min(evict(4, 60_000) for _ in range(3))
    assert pages == 60_000, "a shared run was spilled more than once, or not at all"
    assert shared < 20 * alone


@pytest.mark.parametrize("are_written", [True, False])
def test_books_of_beams_balance_whether_the_disk_took_them_or_not(are_written: bool) -> None:
    """Rows that share, share in part and share nothing: each run counts once, in memory or in the file."""
    engine = FakeEngine(num_pages=41, page_tokens=2, spill_pages=120)
    beams = engine.try_open(Shape(1, 2, batch=3, max_tokens=10))
    other = engine.try_open(Shape(0, 1, batch=1, max_tokens=80))
    engine.step({beams: 5})
    engine.reorder(beams, [0, 0, 2])
    engine.step({beams: 3})
    engine.reorder(beams, [1, 1, 0])
    engine.apply_copies()
    chosen, spills = engine.pool.plan_batch([other], [80], may_spill=True)
    assert chosen == [0]
    engine.file.write(spills, [(engine.slab.ctypes.data, engine.page_bytes)])
    engine.pool.finish_spills(are_written)
    stats, held = engine.pool.stats(), engine.open[beams].held
    assert (stats.pages_mapped, stats.pages_spilled) == ((0, held) if are_written else (held, 0))
    engine.pool.start_restores()
    engine.pool.check_integrity()
    engine.check_contents()
    assert engine.pool.stats().pages_promisable == (engine.capacity if are_written else engine.num_pages)
