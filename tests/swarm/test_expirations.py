"""Until when records are written, by a clock that is not always right."""

from __future__ import annotations

import asyncio
import time

import pytest

from petalsd.errors import SwarmError
from petalsd.swarm.dht_storage import LIMITS
from petalsd.swarm.protocol import ServerState
from petalsd.types import BlockSpan
from tests.swarm.test_announcer import FakeDHT, announcer
from tests.waiting import eventually


async def test_a_clock_that_was_ahead_for_a_while_silences_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ahead_s = time.time, [0.0]

    class Strict(FakeDHT):
        """With a sound clock, as all other nodes."""

        async def store(
            self, keys: list[str], subkey: str, value: object, expiration: float, timeout_s: float
        ) -> list[str]:
            if expiration > clock() + LIMITS.max_lifetime_s:
                return keys
            return await super().store(keys, subkey, value, expiration, timeout_s)

    monkeypatch.setattr(time, "time", lambda: clock() + ahead_s[0])
    ours = announcer(Strict())
    await ours.announce(ServerState.JOINING, BlockSpan(0, 1))
    ahead_s[0] = 86400.0
    with pytest.raises(SwarmError):
        await ours.announce(ServerState.ONLINE, BlockSpan(0, 1))
    ahead_s[0] = 0.0
    await ours.announce(ServerState.ONLINE, BlockSpan(0, 1))


async def test_after_a_sleep_of_the_machine_it_is_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timers stand still meanwhile, the entries' lifetime does not."""
    dht = FakeDHT()
    ours = announcer(dht)
    await ours.announce(ServerState.ONLINE, BlockSpan(0, 1))
    monkeypatch.setattr("petalsd.swarm.announcer._WATCH_S", 0.01)
    ours.start()
    await asyncio.sleep(0)  # it waits for its first renewal now, in 10 s
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 3600)
    await eventually(lambda: len(dht.states()) > 1, timeout_s=5)
    await ours.stop()
    assert dht.entries["m-hf.0"][FakeDHT.peer_id].expiration > clock() + 3600
