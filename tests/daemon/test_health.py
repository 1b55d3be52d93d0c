"""What counts as a part that no longer works."""

from __future__ import annotations

import asyncio
import time

import pytest

from petalsd.daemon import health, presence
from petalsd.daemon.health import engine_problem
from petalsd.daemon.presence import presence_problem
from petalsd.errors import EngineError, SwarmError
from tests.daemon.fakes import FakeEngine, FakeMember, FakeSwarm


@pytest.fixture(autouse=True)
def short_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_ENGINE_STUCK_S", 0.05)
    monkeypatch.setattr(presence, "_P2PD_ANSWERS_S", 0.05)


async def never() -> None:
    await asyncio.Event().wait()


async def test_an_idle_engine_must_pass_its_self_test() -> None:
    """Nothing is wrong when the canary comes back; an error or silence is a problem."""
    engine = FakeEngine([])
    assert await engine_problem(engine) is None
    engine.failures.append(EngineError("NaN"))
    assert "NaN" in str(await engine_problem(engine))
    engine.self_test = never  # type: ignore[method-assign]
    assert "did not come back" in str(await engine_problem(engine))


async def test_a_busy_engine_is_judged_by_its_batch() -> None:
    """No canary is sent; one batch may take its time, but not for ever."""
    engine = FakeEngine([], busy_since_s=time.monotonic())
    assert await engine_problem(engine) is None
    engine.busy_since_s = time.monotonic() - 1
    assert "at one batch for" in str(await engine_problem(engine))
    assert engine.calls == []


async def test_p2pd_must_tell_its_addresses() -> None:
    """A hanging or departed libp2p daemon is a problem."""
    member = FakeMember(FakeSwarm(), [])
    assert await presence_problem(member) is None
    member.maddrs = never  # type: ignore[method-assign,assignment]
    assert "did not answer" in str(await presence_problem(member))

    async def gone() -> list[str]:
        raise SwarmError("not started")

    member.maddrs = gone  # type: ignore[method-assign]
    assert "not started" in str(await presence_problem(member))
