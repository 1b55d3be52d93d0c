"""Announced rates follow what requests show: soon, calmly, whatever the batches are made of."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest

from petalsd.engine.iteration_cost import AttentionShare, Work
from petalsd.engine.live_rates import WINDOW_S, LiveRates
from petalsd.engine.observer import BatchReport, PassTiming
from petalsd.engine.step import PassRequest
from petalsd.engine.throughput import BlockRates
from petalsd.types import BlockSpan
from tests.engine.rig import TinyModel, feed, opened, serving, states

MEASURED = BlockRates(inference_rps=1000.0, forward_rps=16_000.0)
BLOCKS = 4
ATTENTION = AttentionShare(read=1e-4, pair=1e-4)
# One token through a block takes 1 ms, a pass of 1024 takes 64 ms.
STEP_TOKEN_S = 0.0625e-3
READ_S = 0.9375e-3
PASS_TOKEN_S = (0.064 - READ_S) / ATTENTION.work(1, 1024, 0, 1).tokens


class Machine:
    """Computes at ``slowdown`` times what was measured, with a tenth of noise and an outlier now and then."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slowdown = 1.0
        self.rates = LiveRates(ATTENTION, lambda: self.now)
        self.rates.begin(MEASURED)
        self._rng = random.Random(0)

    def window(self, *, rows: tuple[int, ...] = (), context: int = 0, passes: int = 0) -> BlockRates:
        """Half a minute with 40 batches of decode of each number of rows, and so many passes of 512 tokens."""
        for num_rows in rows:
            tokens = ATTENTION.work(num_rows, 1, context, BLOCKS)
            work = Work(BLOCKS + tokens.reads, tokens.tokens)
            for _ in range(40):
                report = BatchReport(self._takes(work), work, rows=num_rows, decode_tokens=num_rows)
                self.rates.batch_done(report)
        for _ in range(passes):
            work = Work(BLOCKS, ATTENTION.work(1, 512, 0, BLOCKS).tokens)
            seconds = self._takes(work, PASS_TOKEN_S)
            self.rates.pass_done(PassTiming(False, 512, 9.0, 99.0, work, seconds))
        self.now += WINDOW_S
        return self.rates.rates()

    def _takes(self, work: Work, token_s: float = STEP_TOKEN_S) -> float:
        outlier = 30.0 if self._rng.random() < 0.05 else 1.0
        noise = self._rng.uniform(0.9, 1.1)
        return (READ_S * work.reads + token_s * work.tokens) * self.slowdown * noise * outlier


@pytest.mark.parametrize("rows", [(1,), (8,), (1, 4, 16, 64)])
def test_a_machine_at_its_speed_stays_where_it_was_measured(rows: tuple[int, ...]) -> None:
    """Whatever the size of batches, the context behind them, outliers and waits: within some percent."""
    machine = Machine()
    for number in range(30):
        rates = machine.window(rows=rows, context=100 * number, passes=5)
        assert rates.inference_rps == pytest.approx(MEASURED.inference_rps, rel=0.06)
        assert rates.forward_rps == pytest.approx(MEASURED.forward_rps, rel=0.06)
    assert machine.rates.is_live


@pytest.mark.parametrize("rows", [(1,), (1, 8, 32)])
def test_a_slower_machine_shows_within_minutes_and_step_by_step(rows: tuple[int, ...]) -> None:
    """Half the speed is found to a tenth within eight windows, no window changes more than a quarter."""
    machine = Machine()
    machine.window(rows=rows)
    machine.slowdown = 2.0
    seen = [machine.window(rows=rows) for _ in range(8)]
    assert seen[-1].inference_rps == pytest.approx(MEASURED.inference_rps / 2, rel=0.1)
    assert seen[-1].forward_rps == pytest.approx(MEASURED.forward_rps / 2, rel=0.1), "as steps do"
    assert all(0.75 < after.inference_rps / before.inference_rps < 1.03 for before, after in pairwise(seen))


def test_passes_speak_for_themselves() -> None:
    """Where passes are seen, they say how fast passes are, and steps keep their own rate."""
    machine = Machine()
    machine.slowdown = 2.0
    for _ in range(10):
        rates = machine.window(passes=5)
    assert rates.forward_rps == pytest.approx(MEASURED.forward_rps / 2, rel=0.1)
    assert rates.inference_rps == pytest.approx(MEASURED.inference_rps)


def test_too_few_samples_and_other_work_teach_nothing() -> None:
    """A handful of batches, prefill, backward passes and batches other than planned are left out."""
    machine = Machine()
    for _ in range(100):
        machine.rates.batch_done(BatchReport(9.0, Work(4, 400), rows=1, prefill_tokens=100))
        machine.rates.batch_done(BatchReport(9.0, rows=1, decode_tokens=1))
        machine.rates.pass_done(PassTiming(True, 512, 0.0, 9.0, Work(4, 2048), 9.0))
    for _ in range(10):
        machine.rates.batch_done(BatchReport(9.0, Work(4, 4), rows=1, decode_tokens=1))
    assert machine.window() == pytest.approx(MEASURED) and not machine.rates.is_live


def test_what_nobody_shows_any_more_is_forgotten() -> None:
    """A machine that was slow when clients left is not slow for ever."""
    machine = Machine()
    machine.slowdown = 3.0
    for _ in range(10):
        slow = machine.window(rows=(1,))
    assert slow.inference_rps < 400 and machine.rates.is_live
    machine.now += 40 * WINDOW_S
    assert machine.rates.rates().inference_rps == pytest.approx(MEASURED.inference_rps, rel=0.05)
    assert not machine.rates.is_live


def test_rates_stay_fit_to_announce_on_a_machine_gone_wild() -> None:
    """Never zero, infinite or no number: BlockRates would refuse them."""
    machine = Machine()
    for slowdown in (1e-9, 1e9, 1e-9, 1e9):
        machine.slowdown = slowdown
        for _ in range(50):
            machine.window(rows=(1, 64), passes=4)


def test_before_there_is_a_measurement_there_are_no_rates() -> None:
    """What is told until then is not kept."""
    rates = LiveRates(ATTENTION)
    rates.batch_done(BatchReport(0.1, Work(1, 1), rows=1, decode_tokens=1))
    assert not rates.is_live
    with pytest.raises(ValueError, match="no rates"):
        rates.rates()


async def test_a_real_engine_tells_what_the_rates_need(tmp_path: Path) -> None:
    """Decode steps and passes of a tiny model: far faster than a measurement that claims a token per second."""
    now = [0.0]
    live = LiveRates(AttentionShare(), lambda: now[0])
    live.begin(BlockRates(1.0, 1.0))

    class Observer:
        batch_done, pass_done = staticmethod(live.batch_done), staticmethod(live.pass_done)

        def session_admitted(self, wait_s: float) -> None:
            pass

    async with serving(TinyModel(tmp_path), observer=Observer()) as engine:
        async with opened(engine) as session:
            await feed(session, states(1, 25), [5] + [1] * 20)
        for _ in range(4):
            await engine.forward(PassRequest(BlockSpan(0, 4), states(1, 30), "a peer"))
        async with opened(engine):  # the last pass is told of after its answer
            pass
    now[0] = WINDOW_S
    rates = live.rates()
    assert live.is_live and rates.inference_rps > 1.05 and rates.forward_rps > 1.05
