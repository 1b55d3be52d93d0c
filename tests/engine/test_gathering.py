"""Batches wait for sessions that come back soon, and for nobody else; pure, on times that the tests make up."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
import torch

from petalsd.engine.gathering import MAX_PAUSE, Gathering
from tests.engine.rig import HookedBlock, TinyModel, feed, opened, serving, states
from tests.engine.simulation import Decoder, Device, Simulation

ONE, OTHER = 0, 1
ITERATION_S = 1.0


def answered_together(other_away_s: float) -> tuple[Gathering, float]:
    """The state and the time after some rounds in which ONE was away for 0.01 s and OTHER for ``other_away_s``."""
    gathering, now = Gathering(), 0.0
    for _ in range(3):
        gathering.arrived(ONE, now + 0.01)
        gathering.arrived(OTHER, now + other_away_s)
        now += max(0.01, other_away_s) + ITERATION_S
        gathering.answered(ONE, now)
        gathering.answered(OTHER, now)
        gathering.ran(ITERATION_S, now, has_more=False)
    return gathering, now


def test_a_session_due_soon_is_waited_for() -> None:
    """The first one back waits until the other is due, with some lateness allowed, or comes."""
    gathering, now = answered_together(other_away_s=0.02)
    gathering.arrived(ONE, now + 0.01)
    assert 0.01 < gathering.pause_s(now + 0.01) < 0.04
    gathering.arrived(OTHER, now + 0.02)
    assert gathering.pause_s(now + 0.02) == 0.0


def test_a_late_session_is_given_up() -> None:
    """When the other doesn't come by the time it is due, nobody waits any longer."""
    gathering, now = answered_together(other_away_s=0.02)
    gathering.arrived(ONE, now + 0.01)
    assert gathering.pause_s(now + 0.05) == 0.0


def test_a_client_far_away_is_not_waited_for() -> None:
    """A session whose absence is long against an iteration holds nobody up."""
    gathering, now = answered_together(other_away_s=0.5)
    gathering.arrived(ONE, now + 0.01)
    assert gathering.pause_s(now + 0.01) == 0.0


@pytest.mark.parametrize("away_s", [0.01, 0.05, 0.12, 0.2, 0.4])
def test_a_pause_never_exceeds_its_share(away_s: float) -> None:
    """Whoever is due, a batch that is ready starts within its share of an iteration."""
    gathering, now = answered_together(away_s)
    gathering.arrived(ONE, now + 0.01)
    assert gathering.pause_s(now + 0.01) <= MAX_PAUSE * ITERATION_S + 1e-9


def test_a_step_that_came_during_an_iteration_waits_from_its_end() -> None:
    """The pause of a step that arrived while the device was busy counts from when the device was free."""
    gathering, now = answered_together(other_away_s=0.02)
    gathering.arrived(2, now - 0.9 * ITERATION_S)
    assert gathering.pause_s(now) > 0.02


def test_closed_sessions_are_not_waited_for() -> None:
    """Nobody waits for a session that ended."""
    gathering, now = answered_together(other_away_s=0.02)
    gathering.arrived(ONE, now + 0.01)
    gathering.forget(OTHER)
    assert gathering.pause_s(now + 0.01) == 0.0


def steps_per_s(num_clients: int, away_s: float, gathers: bool) -> float:
    """Of clients that came one after the other and are away for ``away_s`` and up to as long again."""
    source = random.Random(1)
    clients = [
        Decoder(key, away_s * (1 + source.random()), due_at=0.02 * source.random())
        for key in range(num_clients)
    ]
    simulation = Simulation(Device(noise=0.05), clients, gathers)
    simulation.run(100)
    simulation.forget_waits()
    started = simulation.now
    simulation.run(300)
    return len(simulation.waits()) / (simulation.now - started)


@pytest.mark.parametrize(("away_s", "gain"), [(0.0003, 1.5), (0.002, 1.2), (0.02, 0.99)])
def test_eight_clients_gain_where_they_are_near(away_s: float, gain: float) -> None:
    """Where they are back within part of an iteration of ten milliseconds; those that are far lose nothing."""
    assert steps_per_s(8, away_s, gathers=True) >= gain * steps_per_s(8, away_s, gathers=False)


@pytest.mark.parametrize("away_s", [0.0003, 0.002, 0.02])
def test_a_lone_client_is_never_held_up(away_s: float) -> None:
    """There is nobody to wait for."""
    assert steps_per_s(1, away_s, gathers=True) == steps_per_s(1, away_s, gathers=False)


@pytest.mark.parametrize("num_sessions", [2, 4])
async def test_sessions_in_a_closed_loop_run_together(llama: TinyModel, num_sessions: int) -> None:
    """Sessions that answer at once do not fall apart into alternating groups."""

    def be_slow(hidden: torch.Tensor) -> None:
        time.sleep(0.08)

    blocks = {0: HookedBlock(llama.blocks[0], be_slow)}
    async with serving(llama, blocks=blocks) as engine:

        async def decode(number: int) -> None:
            async with opened(engine, peer=f"peer-{number}") as session:
                await feed(session, states(1, 14), [1] * 14)

        await asyncio.gather(*(decode(number) for number in range(num_sessions)))
        stats = engine.stats()
    assert stats.steps_total / stats.iterations_total > 0.7 * num_sessions
