"""A drain of fakes."""

from __future__ import annotations

import asyncio

from structlog.testing import capture_logs

from petalsd.daemon.drain import Drain
from petalsd.types import BlockSpan
from tests.daemon.fakes import FakeEngine, FakeMember, FakeSwarm


async def test_the_hand_over_of_the_last_session_is_told() -> None:
    """The drain sees that nothing is left before the hand-over returns, and still has its line written."""
    noticed = asyncio.Event()

    class Engine(FakeEngine):
        def work_outside(self, kept: BlockSpan | None) -> int:
            if not self.sessions:
                noticed.set()
            return super().work_outside(kept)

    class Member(FakeMember):
        async def hand_over(self, kept: BlockSpan | None, deadline_s: float) -> int:
            engine.sessions = 0
            await noticed.wait()
            return 2

    engine = Engine([], sessions=2)
    with capture_logs() as lines:
        assert await Drain(engine, Member(FakeSwarm(), []), 20.0).wait(asyncio.Event()) == 0
    told = [line for line in lines if line["event"] == "handed_over"]
    assert [(line["sessions"], line["left"]) for line in told] == [(2, 0)]


async def test_a_hand_over_that_breaks_is_told() -> None:
    """Sessions have their time here; the error is in the log and not lost with the task."""
    member = FakeMember(FakeSwarm(), [])
    member.failures["hand_over"] = [LookupError("a bug")]
    with capture_logs() as lines:
        assert await Drain(FakeEngine([], sessions=2), member, 0.2).wait(asyncio.Event()) == 2
    assert ["a bug" in line["error"] for line in lines if line["event"] == "hand_over_broke"] == [True]
