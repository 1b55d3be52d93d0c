"""The simulator: replays one scenario under one or several policies, event by event."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from benchmarks.swarm_sim.fleet import MODELS, Fleet, Scenario, draw_fleet
from benchmarks.swarm_sim.policies import LEAVE, Policy
from benchmarks.swarm_sim.reference import bound_shares, offline_best
from benchmarks.swarm_sim.view import JOINING, ONLINE, Record, Server, View
from petalsd.swarm.placement.growth import loading_order
from petalsd.swarm.placement.policy import Policy as Constants
from petalsd.types import BlockSpan

T = TypeVar("T")

_MIN_LOAD_S = 10.0
_CONSTANTS = Constants()
_BACK_AGAIN = 0.9  # of the offline reference


@dataclass(slots=True)
class Outcome:
    """What a run showed; averages are over the time from ``steady_from`` on.

    share        throughput, as a share of the offline reference
    uncovered    share of the time in which some block is not served
    moves        per server-hour
    cut          servers' worth of sessions that planned moves end, per server-hour: stock Petals ends all, petalsd
                 those on blocks that are left and that no single other petalsd serves
    *_s          until the throughput is back at 90 % of the reference, after the first burst, wave and outage
    """

    policy: str
    model: str
    servers: int
    seed: int
    share: float = 0.0
    uncovered: float = 0.0
    moves: float = 0.0
    cut: float = 0.0
    join_s: float = math.inf
    wave_s: float = math.inf
    outage_s: float = math.inf
    slowest_ms: float = 0.0
    decisions: int = 0


class Ceiling:
    """What the servers alive could do: an upper bound at each time, and the offline reference on a grid."""

    def __init__(self, scenario: Scenario, fleet: Fleet, seed: int, grid_s: float = 900.0) -> None:
        self.blocks = MODELS[scenario.model].blocks
        # From here on an ideal server would be up: until then nobody can be blamed.
        self.ready = fleet.arrive + scenario.select_delay + fleet.load_s
        self.share = bound_shares(fleet.n, fleet.t, self.blocks)
        marks = [
            at + 1 for at in (scenario.wave_at + scenario.burst_s, scenario.outage_at) if at < scenario.end
        ]
        self.times = sorted([*np.arange(grid_s, scenario.end, grid_s).tolist(), *marks])
        self.reached = [self._reached(fleet, seed, at) for at in self.times]

    def _reached(self, fleet: Fleet, seed: int, at: float) -> float:
        alive = np.flatnonzero((self.ready <= at) & (fleet.depart > at))
        best = offline_best(fleet.n[alive], fleet.t[alive], self.blocks, seed, 4 if len(alive) < 40 else 1)
        return min(best / max(float(self.share[alive].sum()), 1e-9), 1.0)

    def ratio(self, now: float) -> float:
        """Reference / bound."""
        at = int(np.searchsorted(self.times, now + 1, "right"))
        return self.reached[max(at - 1, 0)]


class Simulation:
    """Servers of several policies are mixed at random, in equal parts."""

    def __init__(
        self,
        scenario: Scenario,
        policies: Sequence[Policy],
        seed: int,
        name: str = "",
        ceiling: Ceiling | None = None,
    ) -> None:
        self.scenario, self.fleet = scenario, draw_fleet(scenario, seed)
        fleet, count = self.fleet, len(self.fleet.n)
        self.ceiling = ceiling or Ceiling(scenario, fleet, seed)
        self.rng = np.random.default_rng([seed, 3])
        kind = np.random.default_rng([seed, 4]).permutation(count) % len(policies)
        self.policy = [policies[number] for number in kind]
        rows = zip(fleet.n.tolist(), fleet.t.tolist(), (fleet.load_s / fleet.n).tolist(), strict=True)
        self.servers = [Server(row, n, t, n, block_s) for row, (n, t, block_s) in enumerate(rows)]
        blocks = MODELS[scenario.model].blocks
        self.view = View(blocks, fleet, np.array([policy.follows for policy in self.policy]))
        self.now, self.queue = (
            0.0,
            list[tuple[float, int, Callable[..., None], int, int, tuple[object, ...]]](),
        )
        self.count, self.epoch = 0, [0] * count
        self.disks = [dict[int, None]() for _ in range(count)]
        self.served, self.rates = [(0, 0)] * count, [0.0] * count
        self.sent, self.shown, self.sent_at = [0] * count, [0] * count, [0.0] * count
        self.cover, self.bound, self.mass, self.alive = np.zeros(blocks), 0.0, 0.0, 0
        self.goals: dict[str, float] = {}
        self.num_moves = 0
        self.outcome = Outcome(name, scenario.model, scenario.servers, seed)

    def run(self) -> Outcome:
        scenario, fleet = self.scenario, self.fleet
        for row in np.flatnonzero(fleet.arrive < scenario.end).tolist():
            self._at(float(fleet.arrive[row]), self._arrive, row)
        marks = {
            "join_s": scenario.burst_s,
            "wave_s": scenario.wave_at + scenario.burst_s,
            "outage_s": scenario.outage_at + 0.5,
        }
        for name, when in marks.items():
            self._at(when, self._milestone, -1, name)
        total = np.zeros(4)  # throughput, reference, time with a hole, time
        while self.queue and self.queue[0][0] < scenario.end:
            when, _, what, row, epoch, arguments = heapq.heappop(self.queue)
            since = max(when, scenario.steady_from) - max(self.now, scenario.steady_from)
            low = float(self.cover.min())
            if since > 0:
                total += since * np.array([low, self.bound * self.ceiling.ratio(self.now), low <= 0, 1.0])
            self.now = when
            if row < 0 or epoch == self.epoch[row]:
                what(row, *arguments)
            self._reach_goals()
        self._conclude(total)
        return self.outcome

    def _conclude(self, total: np.ndarray) -> None:
        outcome, fleet, end = self.outcome, self.fleet, self.scenario.end
        outcome.share, outcome.uncovered = float(total[0] / total[1]), float(total[2] / total[3])
        stays = float((np.minimum(fleet.depart, end) - np.minimum(fleet.arrive, end)).sum()) / 3600
        outcome.moves, outcome.cut = self.num_moves / stays, outcome.cut / stays

    def _reach_goals(self) -> None:
        if self.goals and self.bound > 0:
            low = float(self.cover.min())
            if low >= _BACK_AGAIN * self.ceiling.ratio(self.now) * self.bound:
                for name, since in self.goals.items():
                    setattr(self.outcome, name, self.now - since)
                self.goals.clear()

    def _milestone(self, _: int, name: str) -> None:
        self.goals[name] = self.now

    def _at(self, when: float, what: Callable[..., None], row: int, *arguments: object) -> None:
        """Calls ``what(row, *arguments)`` at ``when``, unless server ``row`` has left by then."""
        self.count += 1
        epoch = self.epoch[row] if row >= 0 else 0
        heapq.heappush(self.queue, (when, self.count, what, row, epoch, arguments))

    # A server's life: arrive, select, online, check ..., leave.

    def _arrive(self, row: int) -> None:
        self.alive += 1
        self._at(float(self.fleet.depart[row]), self._leave, row)
        self._at(float(self.ceiling.ready[row]), self._count_in, row, 1)
        self._at(self.now + self.rng.uniform(0, 2 * self.scenario.select_delay), self._select, row)

    def _count_in(self, row: int, sign: int) -> None:
        self.bound += sign * float(self.ceiling.share[row])
        self.mass += sign * float(self.fleet.n[row] * self.fleet.t[row])

    def _select(self, row: int) -> None:
        server, policy = self.servers[row], self.policy[row]
        server.start = self._timed(lambda: policy.choose_start(self.view, server, self.rng))
        self._announce(row, Record(JOINING, server.start, server.start + server.n))
        if policy.follows:
            self._load(row, self._order(row, server.span, None), 0, server.block_s)
        else:
            load_s = sum(self._load_times(row, list(server.span), server.block_s))
            self._at(self.now + load_s, self._online, row)

    def _order(self, row: int, goal: BlockSpan, kept: BlockSpan | None) -> list[int]:
        state, _ = self.view.swarm_state()
        return loading_order(state, self.view.names[row], goal, kept, _CONSTANTS)

    def _load(self, row: int, order: list[int], num_kept: int, block_s: float, done_s: float = 0.0) -> None:
        """Those behind ``num_kept`` serve as they come, a part at a time; loading began ``done_s`` ago."""
        when = last = self.now - done_s
        for number, load_s in enumerate(self._load_times(row, order[num_kept:], block_s), num_kept + 1):
            when += load_s
            if number < len(order) and when - last >= self.scenario.part_s:
                last, loaded = when, order[:number]
                self._at(when, self._serve_part, row, min(loaded), max(loaded) + 1)
        self._at(when, self._online, row)

    def _load_times(self, row: int, blocks: list[int], block_s: float) -> list[float]:
        """Of each of ``blocks``: those on the disk need not be fetched. Then all are, the oldest no more."""
        disk, scenario = self.disks[row], self.scenario
        times = [block_s * (1.0 - scenario.fetch_share if block in disk else 1.0) for block in blocks]
        for block in self.servers[row].span:
            disk.pop(block, None)
            disk[block] = None
        while len(disk) > scenario.disk_spans * self.servers[row].longest:
            del disk[next(iter(disk))]
        return times

    def _serve_part(self, row: int, start: int, end: int) -> None:
        self._serve(row, start, end)
        self._announce(row, Record(ONLINE, start, end, self.servers[row].span))

    def _online(self, row: int) -> None:
        server = self.servers[row]
        self._serve(row, server.start, server.start + server.n)
        server.since = self.now
        stay_s = self.policy[row].min_stay_s
        self._announce(row, Record(ONLINE, server.start, server.start + server.n, is_settling=stay_s > 0))
        self._at(self.now + stay_s, self._settle, row, self.sent[row])
        self._next_check(row)

    def _settle(self, row: int, number: int) -> None:
        if self.shown[row] == number == self.sent[row]:
            self.view.settle(row)

    def _next_check(self, row: int) -> None:
        period = self.policy[row].check_s or self.scenario.check_period
        self._at(self.now + self.rng.uniform(0, 2 * period), self._check, row)

    def _check(self, row: int) -> None:
        server, policy = self.servers[row], self.policy[row]
        view = self.view
        shown = view.state[row], view.start[row], view.n[row]
        if shown != (ONLINE, server.start, server.n):
            return self._next_check(row)  # the directory does not show our own record yet
        server.silent = self._silent() if policy.follows else frozenset()
        # Whoever leaves a ping without an answer is pinged once more before anybody plans without it.
        if server.silent:
            self._at(self.now + self.scenario.search_s, self._decide, row)
        else:
            self._decide(row)

    def _silent(self) -> frozenset[int]:
        """Rows of those that went and whose records are still read, where servers ping all of the swarm."""
        rows = self.view.believed()
        if len(rows) > self.scenario.search_targets:
            return frozenset()
        return frozenset(rows[self.fleet.depart[rows] <= self.now].tolist())

    def _decide(self, row: int) -> None:
        server, policy, view = self.servers[row], self.policy[row], self.view
        goal = self._timed(lambda: policy.should_move(view, server, self.rng, self.now))
        if goal is None:
            return self._next_check(row)
        self.num_moves += 1
        if goal == LEAVE:
            self.outcome.cut += 1
            self._serve(row, 0, 0)
            self._announce(row, Record())
            self._at(self.now + self.rng.uniform(0, 2 * self.scenario.select_delay), self._select, row)
        else:
            num_new = sum(map(len, goal.minus(server.span)))
            block_s = max(_MIN_LOAD_S / num_new, server.block_s) if num_new else 0.0
            self._announce(row, Record(ONLINE, server.start, server.start + server.n, goal))
            order = self._order(row, goal, server.span.intersect(goal))
            new = next((block for block in order if block not in server.span), None)
            fetch_s = 0.0 if new in self.disks[row] else self.scenario.fetch_share * block_s
            self._at(self.now + fetch_s, self._shift, row, goal, order, block_s, fetch_s)

    def _shift(self, row: int, goal: BlockSpan, order: list[int], block_s: float, fetch_s: float) -> None:
        """The first new block is on the disk: those in both spans go on, others are left, the new ones come."""
        server, kept = self.servers[row], self.servers[row].span.intersect(goal)
        for left in server.span.minus(goal):
            self._count_sessions(row, left)
        server.start, server.n = goal.start, len(goal)
        server.t = self.fleet.hardware.throughput(row, server.n)
        if kept == goal:
            return self._online(row)
        if kept is None:
            self._serve(row, 0, 0)
            self._announce(row, Record(JOINING, goal.start, goal.end))
        else:
            self._serve_part(row, kept.start, kept.end)
        self._load(row, order, len(kept or ()), block_s, fetch_s)

    def _count_sessions(self, row: int, left: BlockSpan) -> None:
        """Sessions on blocks that are left go on with another petalsd that serves all of those; else they end."""
        takers = (
            other != row and policy.follows and start <= left.start and left.end <= end
            for other, (policy, (start, end)) in enumerate(zip(self.policy, self.served, strict=True))
        )
        if not any(takers):
            self.outcome.cut += len(left) / self.servers[row].n

    def _leave(self, row: int) -> None:
        self.alive -= 1
        self.epoch[row] += 1
        self._serve(row, 0, 0)
        if self.now >= self.ceiling.ready[row]:
            self._count_in(row, -1)
        if not self.fleet.crash[row]:
            self._announce(row, Record())
        elif self.sent[row]:
            self._crash(row)

    def _crash(self, row: int) -> None:
        """The record stays until it expires; before, others' pings may tell that nobody answers there."""
        scenario, number = self.scenario, self.sent[row] + 1
        since = (self.now - self.sent_at[row]) % scenario.update_period
        self._announce(row, Record(), scenario.expiration - since)
        pings = np.sort(self.rng.uniform(0, scenario.update_period, min(scenario.ping_targets, self.alive)))
        if len(pings) >= 2:
            exposed = float(pings[1]) + scenario.ping_timeout + self.rng.uniform(0, scenario.dht_delay)
            self._at(self.now + exposed, self._expose, -1, row, number)

    def _expose(self, _: int, row: int, number: int) -> None:
        if self.shown[row] < number and self.view.state[row]:
            self.view.declare_dead(row)

    def _announce(self, row: int, record: Record, delay: float | None = None) -> None:
        self.sent[row] += 1
        self.sent_at[row] = self.now
        delay = float(self.rng.uniform(0, self.scenario.dht_delay)) if delay is None else delay
        self._at(self.now + delay, self._show, -1, row, self.sent[row], record)

    def _show(self, _: int, row: int, number: int, record: Record) -> None:
        if number > self.shown[row]:
            self.shown[row] = number
            self.view.put(row, record)

    def _serve(self, row: int, start: int, end: int) -> None:
        (old_start, old_end), self.served[row] = self.served[row], (start, end)
        self.cover[old_start:old_end] -= self.rates[row]
        self.rates[row] = self.servers[row].t
        self.cover[start:end] += self.rates[row]

    def _timed(self, decide: Callable[[], T]) -> T:
        begin = time.thread_time()
        answer = decide()
        self.outcome.slowest_ms = max(self.outcome.slowest_ms, 1e3 * (time.thread_time() - begin))
        self.outcome.decisions += 1
        return answer
