"""Sessions admitted at a given KV memory, and what a trip of one to the disk and back costs.

    python -m benchmarks.admission [--kv-tokens 16384] [--decode 8] [--spill-directory /tmp]

Clients ask for 2048 tokens and use 200 on average (exponentially distributed). A server that keeps memory for all
that is asked for, as stock Petals does, admits bytes / 2048 tokens. All sessions that petalsd admits run to their
end: a prefill, then decode steps side by side. In process, all blocks of the demo model, bfloat16.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import time
from pathlib import Path

import torch

from benchmarks.decode_step import CPU, DEMO_MODEL, PAGE_TOKENS, Model
from benchmarks.report import Row, publish
from benchmarks.timing import Spread, summarize
from petalsd.daemon.spilling import AUTO_CACHES
from petalsd.engine.engine import Engine
from petalsd.engine.handle import Session
from petalsd.engine.limits import EngineLimits
from petalsd.engine.step import SessionSpec, Step
from petalsd.errors import OutOfPages
from petalsd.kvcache.observer import NullPoolObserver
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.session import KVRequest
from petalsd.kvcache.sizing import KVGeometry, pages_for
from petalsd.kvcache.spill import SpillArea
from petalsd.kvcache.waiting import AdmissionRules

ASKED_TOKENS = 2048
USED_TOKENS = 200  # on average
NUM_PEERS = 8
MAX_PEER_SHARE = 0.75
NUM_TRAVELLERS = 64


class Trips(NullPoolObserver):
    """Bytes and seconds of every write and every read."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, float]] = []
        self.reads: list[tuple[int, float]] = []

    def spilled(self, num_bytes: int, seconds: float) -> None:
        self.writes.append((num_bytes, seconds))

    def restored(self, num_bytes: int, seconds: float) -> None:
        self.reads.append((num_bytes, seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description="Sessions admitted at a KV memory.")
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--kv-tokens", type=int, default=16384, help="tokens of cache per block, in memory")
    parser.add_argument("--decode", type=int, default=8, help="tokens that each session decodes at its end")
    parser.add_argument("--spill-directory", type=Path, default=Path("/tmp"))
    options = parser.parse_args()
    model = Model(options.model.resolve(), torch.bfloat16)
    rows = asyncio.run(count_admitted(model, options.kv_tokens, options.decode, options.spill_directory))
    publish("admission", rows + asyncio.run(time_trips(model, options.spill_directory)))


async def count_admitted(model: Model, kv_tokens: int, num_decoded: int, directory: Path) -> list[Row]:
    """How many sessions petalsd admits, and how long it takes them all to run to their end."""
    trips = Trips()
    pool = make_pool(model, kv_tokens, directory, trips)
    engine = Engine(EngineLimits(), CPU)
    await engine.start()
    try:
        await engine.load_span(model.blocks, pool, model.rope)
        sessions = await admit_all(engine)
        started = time.perf_counter()
        used = await run_all(sessions, num_decoded, model.config.hidden_size)
        seconds = time.perf_counter() - started
        stats = pool.stats()
    finally:
        await engine.stop(60)
    stock = kv_tokens // ASKED_TOKENS
    setting = (
        f"{kv_tokens} tokens of KV memory, asked {ASKED_TOKENS}, used {sum(used) / len(used):.0f} on average"
    )
    return [
        count_row("stock Petals (arithmetic)", setting, "sessions admitted", "sessions", stock),
        count_row("petalsd", setting, "sessions admitted, all ran to their end", "sessions", len(sessions)),
        count_row("petalsd", setting, "admitted against stock", "times", len(sessions) / stock),
        count_row("petalsd", setting, "tokens computed by them all", "tokens/s", sum(used) / seconds),
        count_row("petalsd", setting, "pages that came back from the disk", "pages", stats.pages_restored),
    ]


async def admit_all(engine: Engine) -> list[Session]:
    """As many sessions as the engine takes, of peers in turn."""
    assert engine.span is not None
    sessions: list[Session] = []
    for number in itertools.count():
        spec = SessionSpec(engine.span, 1, ASKED_TOKENS, f"peer {number % NUM_PEERS}")
        try:
            sessions.append(await engine.open_session(spec))
        except OutOfPages:
            return sessions
    raise AssertionError("unreachable")


async def run_all(sessions: list[Session], num_decoded: int, hidden_size: int) -> list[int]:
    """Each session's tokens: a prefill; single ones once all have theirs, so that they need the memory at once."""
    rng = random.Random(0)
    lengths = [min(ASKED_TOKENS, num_decoded + 1 + round(rng.expovariate(1 / USED_TOKENS))) for _ in sessions]

    async def step(session: Session, num_tokens: int) -> None:
        answer = await session.step(Step(torch.randn(1, num_tokens, hidden_size), session.position))
        assert bool(torch.isfinite(answer).all())

    pairs = list(zip(sessions, lengths, strict=True))
    await asyncio.gather(*(step(session, length - num_decoded) for session, length in pairs))
    for _ in range(num_decoded):
        await asyncio.gather(*(step(session, 1) for session in sessions))
    assert [session.position for session in sessions] == lengths
    return lengths


async def time_trips(model: Model, directory: Path) -> list[Row]:
    """Sessions of 200 tokens that take turns in a memory for one, more of them than the processor's caches hold.

    In two rounds each is new: the first, which is not counted, makes the system take memory for the file. In the
    third nothing is new, and so nothing is written.
    """
    trips = Trips()
    pool = make_pool(model, USED_TOKENS, directory, trips, NUM_TRAVELLERS)
    request = KVRequest(0, model.config.num_blocks, 1, USED_TOKENS)
    sessions = [await pool.reserve(request, 0) for _ in range(NUM_TRAVELLERS)]
    for is_new in (True, True, False):
        if is_new:
            trips.writes.clear()
        for session in sessions:
            if is_new:
                session.truncate(0)
            assert pool.make_room([(session, USED_TOKENS)]).ready == [0]
            session.extend(USED_TOKENS)
    pool.close()
    session_bytes = max(num_bytes for num_bytes, _ in trips.reads)
    setting = (
        f"a session of {USED_TOKENS} tokens in {model.config.num_blocks} blocks, {session_bytes / 1e6:.2f} MB"
    )
    rows = []
    for what, samples in (("write", trips.writes), ("read back", trips.reads)):
        milliseconds = summarize([1e3 * seconds for _, seconds in samples])
        rows.append(Row("petalsd", setting, f"{what} one session", "ms", milliseconds))
        rates = summarize([num_bytes / 1e6 / seconds for num_bytes, seconds in samples])
        rows.append(Row("petalsd", setting, f"{what}, rate", "MB/s", rates))
    return rows


def make_pool(
    model: Model, kv_tokens: int, directory: Path, trips: Trips, num_caches: int = AUTO_CACHES
) -> KVPool:
    """As a daemon makes it on a disk with room for so many times the memory."""
    config = model.config
    geometry = KVGeometry(PAGE_TOKENS, config.num_kv_heads, config.head_dim, model.dtype.itemsize)
    num_pages = pages_for(kv_tokens, config.num_blocks, PAGE_TOKENS)
    area = SpillArea(directory, num_caches * num_pages * geometry.page_bytes, keep_free_bytes=1 << 30)
    rules = AdmissionRules(max_peer_share=MAX_PEER_SHARE)
    pool = KVPool(geometry, num_pages, model.dtype, CPU, rules, area, trips)
    pool.allocate()
    return pool


def count_row(provider: str, setting: str, metric: str, unit: str, value: float) -> Row:
    """A figure that has no spread."""
    return Row(provider, setting, metric, unit, Spread(value, value, value, 1))


if __name__ == "__main__":
    main()
