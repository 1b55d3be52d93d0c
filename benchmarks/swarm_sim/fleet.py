"""Who arrives when, with what hardware, and when and how they go: all that no placement rule can change.

A run depends on the scenario, the policies and the seed alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from petalsd.swarm.ghosts import MAX_PINGS

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Model:
    """``params`` and ``cache_bytes`` (16,384 tokens, grouped-query attention of 8 heads) are of one block."""

    blocks: int
    params: float
    hidden: int
    bytes_per_param: float
    cache_bytes: float


MODELS = {
    "8b": Model(32, 0.218e9, 4096, 2.0, 64 * 2**20),
    "70b": Model(80, 0.856e9, 8192, 4.25 / 8, 64 * 2**20),
    "405b": Model(126, 3.19e9, 16384, 4.25 / 8, 64 * 2**20),
}

# Memory in GiB, share of the servers, effective TFLOP/s, whether it stands in a data centre.
CARDS = [
    (8, 0.14, 15, 0),
    (12, 0.2, 25, 0),
    (16, 0.2, 35, 0),
    (24, 0.32, 65, 0),
    (48, 0.07, 75, 1),
    (80, 0.07, 220, 1),
]
REGIONS = 5  # region 0 has twice the usual share of data-centre cards


@dataclass(frozen=True, slots=True)
class Scenario:
    """Times in seconds.

    burst, burst_s         share of the servers that joins at once, and within what time; the others during ramp_s
    wave_at                a second wave of a quarter of the servers
    outage_at, outage_s    one region crashes, and comes back after this time
    short_life             mean stay of 40 % of the servers; the others stay 8 times longer
    crash                  share of the departures that are crashes
    dht_delay              an announcement is seen after U(0, dht_delay)
    update_period          a server refreshes its record that often, and it lives for ``expiration``
    check_period           mean time between checks of the placement, U(0, 2 * check_period)
    select_delay           mean time before a newcomer chooses, U(0, 2 * select_delay)
    load_min, load_all     loading n of L blocks takes load_min + (load_all - load_min) * n / L; a move, its share
    fetch_share            of the load time is the download: a petalsd that moves serves on for that of one block
    part_s                 how much is loaded at a petalsd until that serves: blocks come one after the other
    disk_spans             the disk keeps so many times the blocks that a server holds, those that it had last:
                           they need no download
    ping_targets           servers that each server pings at a refresh, as the wire's next_pings
    ping_timeout           until a ping counts as failed
    search_targets         up to so many servers a petalsd that checks pings itself; those that are silent
    search_s               it pings once more before it plans without them, which takes so long
    steady_from            averages are taken from here on
    """

    model: str = "70b"
    servers: int = 100
    hours: float = 4.0
    burst: float = 0.5
    burst_s: float = 30.0
    ramp_s: float = 1800.0
    wave_at: float = 6000.0
    outage_at: float = 9000.0
    outage_s: float = 2400.0
    short_life: float = 3600.0
    crash: float = 0.5
    dht_delay: float = 5.0
    update_period: float = 120.0
    expiration: float = 240.0
    check_period: float = 60.0
    select_delay: float = 5.0
    load_min: float = 60.0
    load_all: float = 300.0
    fetch_share: float = 0.5
    part_s: float = 5.0
    disk_spans: float = 4.0
    ping_targets: int = 10
    ping_timeout: float = 10.0
    search_targets: int = MAX_PINGS
    search_s: float = 8.0
    steady_from: float = 2400.0

    @property
    def end(self) -> float:
        return self.hours * 3600


@dataclass(frozen=True, slots=True, eq=False)
class Fleet:
    """One row per server: what it is, when it comes and goes, if it crashes, time to load all its blocks."""

    hardware: Hardware
    arrive: Array
    depart: Array
    crash: Flags
    load_s: Array

    @property
    def n(self) -> Ints:
        return self.hardware.n

    @property
    def t(self) -> Array:
        return self.hardware.t


@dataclass(frozen=True, slots=True, eq=False)
class Hardware:
    """One row per server; rates in requests/s.

    n       how many blocks it holds
    device  what it does through one block
    link    what its network carries
    region  where it is
    """

    n: Ints
    device: Array
    link: Array
    region: Ints

    @property
    def t(self) -> Array:
        """Through each of its blocks, if it serves all that it holds."""
        return _throughput(self.device, self.link, self.n)

    def throughput(self, row: int, blocks: int) -> float:
        """Of one server, through each of so many blocks."""
        at = slice(row, row + 1)
        return float(_throughput(self.device[at], self.link[at], np.array([blocks]))[0])

    def rows(self, rows: Ints) -> Hardware:
        return Hardware(self.n[rows], self.device[rows], self.link[rows], self.region[rows])


def _throughput(device: Array, link: Array, blocks: Ints) -> Array:
    """As Petals computes it: min(compute / mean blocks used, network)."""
    t = np.minimum(device / ((blocks + 1) / 2), link)
    return np.asarray(np.maximum(np.round(t * 64), 1) / 64)  # multiples of 1/64: sums are exact in any order


def draw_hardware(model: Model, count: int, rng: np.random.Generator) -> Hardware:
    region = rng.integers(0, REGIONS, count)
    share = np.array(
        [[card[1] * (2 if card[3] and at == 0 else 1) for card in CARDS] for at in range(REGIONS)]
    )
    share = (share / share.sum(1, keepdims=True)).cumsum(1)
    kind = (rng.random(count)[:, None] > share[region]).sum(1).clip(0, len(CARDS) - 1)
    memory, tflops, in_centre = (np.array([card[column] for card in CARDS])[kind] for column in (0, 2, 3))
    free = memory * GIB * 0.96 - 0.5 * GIB - 2 * GIB / 14336 * model.hidden
    block_bytes = model.params * model.bytes_per_param * 1.01 + model.cache_bytes
    n = (free / block_bytes).astype(int).clip(1, model.blocks)
    device = tflops * 1e12 / (2 * model.params) * rng.lognormal(0, 0.2, count)
    home = rng.lognormal(math.log(120), 0.9, count).clip(10, 1000)
    mbit = np.where(in_centre, rng.lognormal(math.log(2000), 0.6, count), home)
    relay = np.where((rng.random(count) < 0.3) & (in_centre == 0), 0.2, 1.0)
    return Hardware(n, device, mbit * 1e6 / (16 * model.hidden) * relay, region)


def draw_fleet(scenario: Scenario, seed: int) -> Fleet:
    rng = np.random.default_rng([seed, 1])
    model, end = MODELS[scenario.model], scenario.end
    arrive = _arrivals(scenario, rng)
    hardware = draw_hardware(model, len(arrive), rng)
    life = rng.exponential(scenario.short_life, len(arrive)) * np.where(rng.random(len(arrive)) < 0.4, 1, 8)
    depart, crash = arrive + np.maximum(life, 60), rng.random(len(arrive)) < scenario.crash
    hit = (hardware.region == 0) & (arrive < scenario.outage_at) & (depart > scenario.outage_at)
    if scenario.outage_at < end:  # the lost servers come back as newcomers with their old hardware
        back = scenario.outage_at + scenario.outage_s + rng.uniform(0, scenario.burst_s, hit.sum())
        left = np.maximum(depart[hit], back + 600)
        depart, crash = np.where(hit, scenario.outage_at, depart), crash | hit
        hardware = hardware.rows(np.concatenate([np.arange(len(hit)), np.flatnonzero(hit)]))
        crash = np.concatenate([crash, crash[hit]])
        arrive, depart = np.concatenate([arrive, back]), np.concatenate([depart, left])
    load_s = scenario.load_min + (scenario.load_all - scenario.load_min) * hardware.n / model.blocks
    return Fleet(hardware, arrive, depart, crash, load_s)


def _arrivals(scenario: Scenario, rng: np.random.Generator) -> Array:
    size, end = scenario.servers, scenario.end
    first, later = (
        round(size * scenario.burst),
        rng.poisson(size * end / (scenario.short_life * (0.4 + 0.6 * 8))),
    )
    times = [
        rng.uniform(0, scenario.burst_s, first),
        rng.uniform(0, scenario.ramp_s, size - first),
        rng.uniform(0, end, later),
    ]
    if scenario.wave_at < end:
        times.append(scenario.wave_at + rng.uniform(0, scenario.burst_s, size // 4))
    return np.concatenate(times)
