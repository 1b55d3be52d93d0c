"""Decode stays within its bound beside prefill and passes, and prefill is not held up for nothing: simulated."""

from __future__ import annotations

import statistics

import pytest

from petalsd.engine.chunk_policy import ITERATION_BOUND, STEP_BOUND
from petalsd.engine.scheduler import PASS_PERIOD
from tests.engine.simulation import FIXED_S, TOKEN_S, Decoder, Device, Simulation

PROMPT = 2048
CLIENTS = {
    "one that is back at once": (1, 0.0),
    "one that is near": (1, 0.003),
    "one that is far": (1, 0.05),
    "eight that are back at once": (8, 0.0),
    "eight that are far": (8, 0.02),
}


def warm(device: Device, num_decoders: int, away_s: float) -> tuple[Simulation, float]:
    """A simulation in which everybody has decoded for a while, and the median of what they waited."""
    simulation = Simulation(device, [Decoder(key, away_s) for key in range(num_decoders)])
    simulation.run(50)
    undisturbed_s = statistics.median(simulation.waits())
    simulation.forget_waits()
    return simulation, undisturbed_s


def prefill_alone_s(device: Device) -> float:
    simulation = Simulation(device, [])
    simulation.prefill(100, PROMPT)
    while simulation.prefills:
        simulation.iterate()
    return simulation.now


def percentile_95(samples: list[float]) -> float:
    return statistics.quantiles(samples, n=20, method="inclusive")[-1]


@pytest.mark.parametrize("client", CLIENTS)
def test_decode_waits_for_few_undisturbed_iterations(client: str) -> None:
    """While a long prefill runs no step takes longer than stated, once prefill was measured."""
    simulation, undisturbed_s = warm(Device(), *CLIENTS[client])
    simulation.prefill(100, PROMPT)
    simulation.run(5)
    simulation.forget_waits()
    while simulation.prefills:
        simulation.iterate()
    assert len(simulation.waits()) > 5
    assert simulation.waits()[-1] <= 1.05 * STEP_BOUND * undisturbed_s


@pytest.mark.parametrize("client", CLIENTS)
def test_noise_does_not_break_the_bound(client: str) -> None:
    """With iterations that vary by a tenth, and a few that take five times as long, 19 of 20 steps are near it."""
    simulation, undisturbed_s = warm(Device(noise=0.1), *CLIENTS[client])
    for key in range(5):
        simulation.prefill(100 + key, PROMPT)
        while simulation.prefills:
            simulation.iterate()
    assert percentile_95(simulation.waits()) <= 1.2 * STEP_BOUND * undisturbed_s


def test_long_contexts_do_not_break_the_bound() -> None:
    """Chunks get smaller the more tokens each of theirs attends to."""
    simulation, undisturbed_s = warm(Device(pair=0.0005), 1, 0.0)
    simulation.prefill(100, PROMPT, context=6000)
    simulation.run(5)
    simulation.forget_waits()
    while simulation.prefills:
        simulation.iterate()
    assert simulation.waits()[-1] <= 1.05 * ITERATION_BOUND * undisturbed_s


@pytest.mark.parametrize("client", CLIENTS)
def test_prefill_is_not_held_up_for_nothing(client: str) -> None:
    """Beside decode it gets as much of the device as the bounds leave: a third at least of its speed alone, or
    a sixth where a client is near enough to be met by every second iteration."""
    simulation, _ = warm(Device(), *CLIENTS[client])
    started = simulation.now
    simulation.prefill(100, PROMPT)
    while simulation.prefills:
        simulation.iterate()
    least = 6 if client == "one that is near" else 3.5
    assert simulation.finished[100] - started <= least * prefill_alone_s(Device())


def test_prefill_alone_takes_whole_batches() -> None:
    """Nobody decodes, so nobody is spared."""
    simulation = Simulation(Device(), [])
    simulation.prefill(100, PROMPT)
    simulation.run(2)
    assert not simulation.prefills
    assert simulation.now == pytest.approx(2 * FIXED_S + PROMPT * TOKEN_S)


def test_a_stream_of_prefills_does_not_hold_decode_back() -> None:
    """Ever new peers with long prompts, more than the device can do: decode keeps its bound all the same."""
    simulation, undisturbed_s = warm(Device(), 2, 0.01)
    for key in range(200):
        simulation.prefill(100 + key, PROMPT, peer=f"prefill-{key}")
        simulation.run(3)
    assert len(simulation.prefills) > 100, "the device kept up with the prompts"
    assert percentile_95(simulation.waits()) <= 1.05 * STEP_BOUND * undisturbed_s


@pytest.mark.parametrize("prefill_factor", [2.0, 8.0])
def test_prefill_gets_on_where_the_bound_cannot_be_held(prefill_factor: float) -> None:
    """Where any iteration with prefill takes longer than it may, chunks are still worth their while."""
    device = Device(prefill_factor=prefill_factor)
    simulation, _ = warm(device, 1, 0.0)
    started = simulation.now
    simulation.prefill(100, PROMPT)
    while simulation.prefills:
        simulation.iterate()
    assert simulation.finished[100] - started <= 5 * prefill_alone_s(device)


@pytest.mark.parametrize("has_prefill", [False, True])
def test_passes_get_their_share_and_keep_the_bound(has_prefill: bool) -> None:
    """A fifth of the device beside decode and an eighth beside decode and prefill; steps stay in time."""
    simulation, undisturbed_s = warm(Device(), 1, 0.0)
    if has_prefill:
        simulation.prefill(100, 50 * PROMPT)
    simulation.run(10, has_pass=True)
    simulation.forget_waits()
    started, simulation.pass_s = simulation.now, 0.0
    simulation.run(50 * PASS_PERIOD, has_pass=True)
    share = simulation.pass_s / (simulation.now - started)
    assert share >= (0.12 if has_prefill else 0.19)
    assert simulation.waits()[-1] <= 1.05 * STEP_BOUND * undisturbed_s
