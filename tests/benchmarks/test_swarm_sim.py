"""The simulator of swarms: what it counts, that it repeats itself, and that petalsd's rule does its work in it."""

from __future__ import annotations

import csv
import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.swarm_sim import __main__ as command
from benchmarks.swarm_sim.cases import CASES, find_case, make_policies
from benchmarks.swarm_sim.decisions import slowest_decision_ms
from benchmarks.swarm_sim.fleet import Scenario, draw_fleet
from benchmarks.swarm_sim.petals_rule import best_start, should_move
from benchmarks.swarm_sim.reference import bound_shares, offline_best
from benchmarks.swarm_sim.results import publish, summarize
from benchmarks.swarm_sim.simulation import Ceiling, Outcome, Simulation
from benchmarks.swarm_sim.view import ONLINE, Record, View
from petalsd.types import BlockSpan

SMALL = Scenario(
    model="70b", servers=8, hours=1.0, wave_at=1e9, outage_at=1800.0, outage_s=600.0, steady_from=900.0
)


def simulate(policy: str, scenario: Scenario = SMALL, seed: int = 3) -> Outcome:
    return Simulation(scenario, make_policies(policy), seed, policy).run()


def test_a_run_repeats_itself() -> None:
    """Scenario, policy and seed say everything."""
    first, second = (replace(simulate("petalsd"), slowest_ms=0.0) for _ in range(2))
    assert first == second
    assert simulate("petalsd", seed=4).share != first.share


def test_petalsd_moves_and_uses_the_swarm_better() -> None:
    """A small swarm that loses a region: moving is worth it, and the figures are shares and rates."""
    ours, still = simulate("petalsd"), simulate("petals-still")
    assert ours.share > still.share
    assert still.moves == 0.0 and still.cut == 0.0
    assert ours.moves > 0.0
    assert 0.0 < ours.share < 1.2 and 0.0 <= ours.uncovered <= 1.0


def test_a_swarm_where_nobody_comes_or_goes_comes_to_rest() -> None:
    """After the joining nobody moves any more, neither among themselves nor beside stock Petals servers."""
    calm = replace(SMALL, short_life=1e9, outage_at=1e9, ramp_s=60.0)
    for policy in ("petalsd", "petalsd+petals"):
        short = Simulation(replace(calm, hours=0.5), make_policies(policy), 5, policy)
        long = Simulation(replace(calm, hours=1.0), make_policies(policy), 5, policy)
        short.run(), long.run()
        assert short.num_moves == long.num_moves, policy


@pytest.mark.parametrize(("policy", "is_early"), [("petalsd", True), ("petals", False)])
def test_blocks_serve_as_they_come(policy: str, is_early: bool) -> None:
    """At petalsd; each part holds the one before, and the last is the whole. Stock Petals serves all at once."""
    shown: dict[int, list[tuple[int, int]]] = {}

    class Noted(Simulation):
        def _serve(self, row: int, start: int, end: int) -> None:
            shown.setdefault(row, []).append((start, end))
            super()._serve(row, start, end)

    simulation = Noted(replace(SMALL, hours=0.3, burst=1.0), make_policies(policy), 3, policy)
    simulation.run()
    first = {row: next(i for i, (a, b) in enumerate(spans) if b - a == simulation.servers[row].n)
             for row, spans in shown.items()}  # fmt: skip
    assert any(index > 0 for index in first.values()) == is_early
    for row, spans in shown.items():
        for (a, b), (c, d) in itertools.pairwise(spans[: first[row] + 1]):
            assert c <= a < b <= d


def test_a_server_on_its_way_counts_where_it_goes_and_serves_where_it_was() -> None:
    """As the records of a daemon that moves are read: nobody plans to move it once more."""
    fleet = draw_fleet(SMALL, 1)
    size, follows = int(fleet.n[0]), np.ones(len(fleet.n), bool)
    view = View(80, fleet, follows)
    view.put(0, Record(ONLINE, 0, size, BlockSpan(2, 2 + size)))
    state, rows = view.swarm_state()
    assert rows.tolist() == [0] and not state.is_free[0]
    assert (state.start[0], state.served_start[0], state.served_end[0]) == (2, 0, size)
    view.put(0, Record(ONLINE, 2, 2 + size))
    assert view.swarm_state()[0].is_free[0]


def test_a_server_that_gives_blocks_up_serves_the_others_faster() -> None:
    """It says so in its record; how many it may serve is read as at the daemon."""
    fleet = draw_fleet(SMALL, 1)
    row = int((fleet.t < fleet.hardware.link * 0.9).argmax())  # its device is the bound
    longest, view = int(fleet.n[row]), View(80, fleet, np.ones(len(fleet.n), bool))
    view.put(row, Record(ONLINE, 0, longest))
    view.put(row, Record(ONLINE, 1, longest - 1))
    state, rows = view.swarm_state()
    assert state.is_free[0] and (state.start[0], state.length[0]) == (1, longest - 2)
    assert state.throughput[0] == view.cover.max() > fleet.t[row]
    lengths = view.lengths(rows, state.is_free)[0]
    assert lengths is not None and lengths.longest == longest
    assert lengths.throughput(longest - 2) == pytest.approx(state.throughput[0], abs=1 / 64)
    assert view.lengths(rows, ~state.is_free) == [None]


def test_servers_of_a_simulation_change_how_many_blocks_they_serve() -> None:
    """Up to what each holds, at the rate that goes with it; the cover is always the sum of what is served."""
    seen: set[int] = set()

    class Checked(Simulation):
        def _serve(self, row: int, start: int, end: int) -> None:
            super()._serve(row, start, end)
            server = self.servers[row]
            assert server.t == self.fleet.hardware.throughput(row, server.n)
            if server.n != server.longest:
                seen.add(row)
            cover = np.zeros(len(self.cover))
            for (first, last), rate in zip(self.served, self.rates, strict=True):
                cover[first:last] += rate
            assert (cover == self.cover).all() and server.n <= server.longest

    Checked(SMALL, make_policies("petalsd"), 4).run()
    assert seen


def test_what_is_on_the_disk_is_not_fetched_again() -> None:
    """Of the blocks that a server had last the disk keeps so many times what it holds."""
    simulation = Simulation(replace(SMALL, disk_spans=2.0, fetch_share=0.5), make_policies("petalsd"), 3)
    server = simulation.servers[0]
    server.n = server.longest = 2

    def load_times(start: int) -> list[float]:
        server.start = start
        return simulation._load_times(0, list(server.span), 8.0)

    assert load_times(0) == [8.0, 8.0]
    assert load_times(1) == [4.0, 8.0]
    assert load_times(0) == [4.0, 4.0]
    assert load_times(5) == [8.0, 8.0]  # and block 2 is the one that was had longest ago
    assert load_times(1) == [4.0, 8.0]


def test_a_view_without_those_who_are_silent() -> None:
    """Whoever has found out plans without them; for others they are there until they are declared dead."""
    fleet = draw_fleet(SMALL, 1)
    view = View(80, fleet, np.ones(len(fleet.n), bool))
    for row in range(3):
        view.put(row, Record(ONLINE, 0, int(fleet.n[row])))
    assert view.swarm_state(frozenset({1}))[1].tolist() == [0, 2]
    assert view.swarm_state()[1].tolist() == [0, 1, 2]
    view.declare_dead(2)
    assert view.swarm_state(frozenset({1}))[1].tolist() == [0]


@pytest.mark.parametrize(("search_targets", "expected"), [(64, {1}), (1, set())])
def test_who_checks_finds_the_crashed_by_its_own_pings(search_targets: int, expected: set[int]) -> None:
    """All of a small swarm answer for themselves; in a larger one only others' word tells."""
    simulation = Simulation(replace(SMALL, search_targets=search_targets), make_policies("petalsd"), 3)
    for row in range(2):
        simulation.view.put(row, Record(ONLINE, 0, simulation.servers[row].n))
    simulation.fleet.depart[:] = [1e9, 50.0, *simulation.fleet.depart[2:]]
    assert simulation._silent() == set()
    simulation.now = 50.0
    assert simulation._silent() == expected


def test_fleets_do_not_depend_on_the_rule() -> None:
    first, second = draw_fleet(SMALL, 1), draw_fleet(SMALL, 1)
    assert (first.arrive == second.arrive).all() and (first.depart == second.depart).all()
    assert (first.depart > first.arrive).all() and (first.n >= 1).all() and (first.t > 0).all()


def test_the_reference_is_below_the_bound() -> None:
    """And above what standing at random reaches."""
    rng = np.random.default_rng(0)
    n, t = rng.integers(2, 9, 20), rng.integers(1, 50, 20).astype(float)
    best = offline_best(n, t, 20, 0, 2)
    assert 0.8 * bound_shares(n, t, 20).sum() < best <= bound_shares(n, t, 20).sum() + 1e-9
    assert offline_best(n[:1], t[:1], 20, 0, 1) == 0.0


def test_the_ceiling_follows_the_swarm() -> None:
    ceiling = Ceiling(SMALL, draw_fleet(SMALL, 3), 3)
    assert all(0.0 <= ratio <= 1.0 for ratio in ceiling.reached)
    assert ceiling.ratio(0.0) == ceiling.reached[0]
    assert ceiling.ratio(1e9) == ceiling.reached[-1]


def test_stock_petals_takes_the_smallest_of_the_sorted_windows() -> None:
    """For all small tables the choice is the minimum over windows of (sorted window, start)."""
    for table in itertools.product([0.0, 1.0, 2.0], repeat=6):
        for length in range(1, 7):
            windows = [(sorted(table[at : at + length]), at) for at in range(7 - length)]
            assert best_start(np.array(table), length) == min(windows)[1]


@pytest.mark.parametrize(
    ("spans", "quality", "is_move"),
    [
        ([(0, 2, 1.0), (0, 2, 1.0)], 0.75, True),
        ([(0, 2, 1.0), (0, 2, 1.0)], 0.0, False),
        ([(0, 2, 1.0), (2, 4, 1.0)], 1.5, True),
        ([(0, 2, 1.0), (2, 4, 9.0), (2, 4, 9.0)], 0.75, False),
        ([(0, 2, 1.0), (2, 4, 1.0), (0, 2, 1.0), (2, 4, 1.0)], 0.75, False),
    ],
)
def test_stock_petals_moves(spans: list[tuple[int, int, float]], quality: float, is_move: bool) -> None:
    """Into a gap, never with quality 0, always above 1; not the only holder of blocks, not in balance."""
    start, end, rate = (np.array([span[column] for span in spans]) for column in range(3))
    cover = np.array([rate[(start <= block) & (block < end)].sum() for block in range(4)])
    bound = float(((end - start) * rate).sum()) / 4
    rng = np.random.default_rng(0)
    assert should_move((start, end, rate.astype(float)), 0, cover, quality, bound, rng) is is_move


def test_cases_are_named() -> None:
    assert find_case("405b/100") in CASES
    assert find_case("8b/7").servers == 7
    for name in ("1b/10", "405b/x", "405b"):
        with pytest.raises(ValueError, match="a case is"):
            find_case(name)
    with pytest.raises(ValueError, match="no policy 'best'"):
        make_policies("petals+best")


def test_results_of_other_cases_stay(tmp_path: Path) -> None:
    """A run replaces the rows of its case and draws all of them."""
    file, picture = tmp_path / "swarm_sim.csv", tmp_path / "placement.svg"

    def outcome(policy: str, seed: int, share: float) -> Outcome:
        return Outcome(policy, "405b", 30, seed, share=share, outage_s=math.inf)

    publish(summarize([outcome("petalsd", 1, 0.8), outcome("petalsd", 2, 0.9)]), file, picture)
    publish(summarize([outcome("petals", 1, 0.7)]), file, picture)
    publish(summarize([outcome("petalsd", 1, 0.5)]), file, picture)
    with file.open(newline="") as opened:
        rows = {row["policy"]: row for row in csv.DictReader(opened)}
    assert {policy: row["share"] for policy, row in rows.items()} == {"petalsd": "0.5", "petals": "0.7"}
    assert rows["petals"]["outage_s"] == "inf"
    assert "stock Petals" in picture.read_text()


def test_the_command_simulates_a_case(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["swarm_sim", "--case", "8b/4", "--policy", "petalsd", "--seeds", "1", "--print-only"]
    monkeypatch.setattr("sys.argv", words)
    assert command.main() == 0
    assert "8b/4" in capsys.readouterr().out


def test_a_decision_is_timed_on_an_unsettled_swarm() -> None:
    assert slowest_decision_ms("70b", 40, repetitions=2) > 0.0
