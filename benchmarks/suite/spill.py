"""A trip of an idle session's keys and values to the spill file, and back for its next step.

Sessions of 200 tokens take turns in a memory for one, more of them than the processor's caches hold. In two rounds
each is new, and so is written when the next one comes; the first round, in which the system takes memory for the
file, is not counted. In the third all come back as they were, and nothing need be written.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import torch

from benchmarks.benchmark import Benchmark, Options
from benchmarks.local_model import CPU, PAGE_TOKENS
from benchmarks.report import OURS, Row
from benchmarks.timing import summarize
from petalsd.daemon.spilling import KEEP_FREE_BYTES
from petalsd.engine.cache_geometry import cache_geometry
from petalsd.kvcache.observer import NullPoolObserver
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.session import KVRequest, KVSession
from petalsd.kvcache.sizing import pages_for
from petalsd.kvcache.spill import SpillArea
from petalsd.kvcache.waiting import AdmissionRules
from petalsd.models.block_config import BlockConfig
from petalsd.models.source import ModelSource

FORMAT = "bfloat16"
DTYPE = torch.bfloat16
SESSION_TOKENS = 200
SESSIONS = 64


class Trips(NullPoolObserver):
    """Bytes and seconds of every write and every read."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, float]] = []
        self.reads: list[tuple[int, float]] = []

    def spilled(self, num_bytes: int, seconds: float) -> None:
        self.writes.append((num_bytes, seconds))

    def restored(self, num_bytes: int, seconds: float) -> None:
        self.reads.append((num_bytes, seconds))


def run(options: Options) -> list[Row]:
    config = BlockConfig.from_hf(ModelSource(str(options.model)).config())
    trips = asyncio.run(make_trips(config, 3 if options.smoke else SESSIONS, options.directory))
    setting = {"format": FORMAT, "context": SESSION_TOKENS, "blocks": config.num_blocks}
    return [
        Row(OURS, setting, metric, "ms", summarize([1e3 * seconds for _, seconds in moves]), moves[-1][0])
        for metric, moves in (("session to the disk", trips.writes), ("session back", trips.reads))
    ]


async def make_trips(config: BlockConfig, num_sessions: int, directory: Path) -> Trips:
    trips = Trips()
    pool = make_pool(config, num_sessions, directory, trips)
    try:
        request = KVRequest(0, config.num_blocks, 1, SESSION_TOKENS)
        sessions = [await pool.reserve(request, 0.0) for _ in range(num_sessions)]
        for _ in range(2):
            trips.writes.clear()
            for session in sessions:
                session.truncate(0)
                take_memory(pool, session)
        for session in sessions:
            take_memory(pool, session)
    finally:
        pool.close()
    return trips


def make_pool(config: BlockConfig, num_sessions: int, directory: Path, trips: Trips) -> KVPool:
    """Memory for one session, and a file for all of them."""
    geometry = cache_geometry(config, PAGE_TOKENS, DTYPE, CPU)
    num_pages = pages_for(SESSION_TOKENS, config.num_blocks, PAGE_TOKENS)
    area = SpillArea(directory, num_sessions * num_pages * geometry.page_bytes, KEEP_FREE_BYTES)
    pool = KVPool(geometry, num_pages, DTYPE, CPU, AdmissionRules(), area, trips)
    for slab in pool.allocate().slabs:
        slab.fill_(1.0)  # memory that the system has given
    return pool


def take_memory(pool: KVPool, session: KVSession) -> None:
    """As the engine does before a step of the session."""
    room = pool.make_room([(session, SESSION_TOKENS)])
    if room.failed:
        raise room.failed[0]
    session.extend(SESSION_TOKENS)


BENCHMARK = Benchmark("spill", "an idle session's keys and values to the spill file, and back", run, 10.0)
