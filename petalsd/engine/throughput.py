"""How many tokens per second go through one block here: measured through the engine itself, kept on disk.

A measurement takes a few seconds of full load, so it is done once per model, form of its weights and cache, device
and version, and by one process at a time. Before blocks are loaded a random one gives an estimate; the blocks that
are served are measured through the engine that serves them.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog
import torch

from petalsd import _C, __version__
from petalsd.engine.cache_geometry import cache_geometry
from petalsd.engine.engine import Engine
from petalsd.engine.limits import EngineLimits
from petalsd.engine.runners import RunnerFactory
from petalsd.engine.step import CANARY_PEER, PassRequest, SessionSpec, Step
from petalsd.errors import DeadlineExceeded, NotServed
from petalsd.file_locks import try_lock
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.sizing import pages_for
from petalsd.models.contract import Angles, Block
from petalsd.types import BlockSpan

log = structlog.get_logger(__name__)

_PAGE_TOKENS = 32
_WARM_UP_STEPS = 4
_MAX_STEPS = 100
_SHORT_PASS_TOKENS = 64
PASS_TOKENS = 1024
_MAX_PASSES = 10
_BUDGET_S = 2.0  # for each of the two figures; exceeded by one step or pass at most
_LOCK_POLL_S = 0.2

MEASURE_LIMITS = EngineLimits(max_sessions=1)
"""Of an engine that measures: one session of one row, and no more than that is captured."""


@dataclass(frozen=True, slots=True)
class BlockRates:
    """Tokens per second through one block, finite and greater than zero.

    inference_rps  one token at a time, with a cache
    forward_rps    in passes of 1024 tokens (64 where those would take too long)
    """

    inference_rps: float
    forward_rps: float

    def __post_init__(self) -> None:
        for rate in (self.inference_rps, self.forward_rps):
            if not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"a rate must be finite and greater than zero, got {rate}")


async def measure(
    blocks: Mapping[int, Block], rope: Angles, runners: RunnerFactory, *, stored: torch.dtype | None = None
) -> BlockRates:
    """Measure ``blocks``, consecutive ones of the same kind, in an engine of their own; one is enough.

    ``runners``, for ``MEASURE_LIMITS``, make what computes them: captured steps, where those of the serving engine
    make such. ``stored`` is the dtype of the pages' elements. Takes up to some ten seconds and the memory of a
    small KV pool, which is free afterwards. EngineError when computing fails.
    """
    first, device = next(iter(blocks.values())), runners.device
    geometry = cache_geometry(first.config, _PAGE_TOKENS, first.dtype, device, stored)
    num_pages = pages_for(_WARM_UP_STEPS + _MAX_STEPS, len(blocks), _PAGE_TOKENS)
    pool = KVPool(geometry, num_pages, first.dtype, device)
    pool.allocate()
    engine = Engine(runners.limits, device, runners.num_threads, runners=runners)
    await engine.start()
    try:
        await engine.load_span(blocks, pool, rope)
        return await measure_served(engine)
    finally:
        await engine.stop(_BUDGET_S)


async def measure_served(engine: Engine) -> BlockRates:
    """Run a session and passes through what ``engine`` serves, as the engine's own, not a client's.

    Takes up to some ten seconds. NotServed; OutOfPages or Overloaded when clients leave no room; EngineError.
    """
    span, hidden_size = engine.span, engine.hidden_size
    if span is None or hidden_size is None:
        raise NotServed("no blocks are served here now")
    steps_rate = await _measure_steps(engine, span, hidden_size)
    passes_rate = await _measure_passes(engine, span, hidden_size)
    rates = BlockRates(steps_rate, passes_rate)
    log.info("throughput_measured", span=str(span), **asdict(rates))
    return rates


async def _measure_steps(engine: Engine, span: BlockSpan, hidden_size: int) -> float:
    """Tokens per second through a block, of one session that decodes."""
    max_tokens = min(_WARM_UP_STEPS + _MAX_STEPS, engine.limits.max_session_tokens)
    session = await engine.open_session(SessionSpec(span, 1, max_tokens, CANARY_PEER))
    token = torch.zeros(1, 1, hidden_size)

    async def step() -> None:
        await session.step(Step(token, session.position))

    num_warm_up = min(_WARM_UP_STEPS, max_tokens - 1)
    try:
        for _ in range(num_warm_up):
            await step()
        return len(span) / await _seconds_per_call(step, max_tokens - num_warm_up)
    finally:
        await session.close()


async def _measure_passes(engine: Engine, span: BlockSpan, hidden_size: int) -> float:
    """Tokens per second through a block, of forward passes through as many as there is time for."""

    async def seconds_per_pass(span: BlockSpan, tokens: int, max_passes: int) -> float:
        request = PassRequest(span, torch.zeros(1, tokens, hidden_size), CANARY_PEER)

        async def forward() -> None:
            await engine.forward(request)

        return await _seconds_per_call(forward, max_passes)

    short, tokens = min(_SHORT_PASS_TOKENS, engine.limits.max_session_tokens), PASS_TOKENS
    await seconds_per_pass(span, short, 1)
    block_s = await seconds_per_pass(span, short, 1) / len(span)
    num_blocks = min(len(span), int(_BUDGET_S / (block_s * tokens / short)))
    if not num_blocks or tokens > engine.limits.max_session_tokens:
        return short / block_s
    part = BlockSpan(span.start, span.start + num_blocks)
    return tokens * num_blocks / await seconds_per_pass(part, tokens, _MAX_PASSES)


async def _seconds_per_call(call: Callable[[], Awaitable[None]], max_calls: int) -> float:
    """Mean of as many calls as the budget allows, at least one."""
    start = now = time.perf_counter()
    num_calls = 0
    while num_calls < max_calls and now - start < _BUDGET_S:
        await call()
        num_calls += 1
        now = time.perf_counter()
    return (now - start) / num_calls


def rate_key(model: str, form: str, device: torch.device, num_threads: int = 0) -> str:
    """What the figures depend on; ``model`` is its source as configured, ``form`` that of weights and cache."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if device.type == "cpu":
        name += f" ({_C.LayerTeam(1, 'auto').tier})"
    threads = num_threads or torch.get_num_threads()
    return f"{model} {form} on {name}, {threads} threads, petalsd {__version__}, torch {torch.__version__}"


class RateCache:
    """Measured rates in a JSON file, ``{key: {"inference_rps": …, "forward_rps": …}}``.

    A damaged file counts as empty, and one that cannot be written is done without. ``path`` with ``.lock``
    appended is what processes lock.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, key: str) -> BlockRates | None:
        """What is kept."""
        return self._read().get(key)

    async def get_or_measure(
        self, key: str, measure: Callable[[], Awaitable[BlockRates]], timeout_s: float
    ) -> BlockRates:
        """The kept rates, or measured ones, which are kept then. One process measures while the others wait.

        DeadlineExceeded when others do not come to an end in ``timeout_s``.
        """
        async with self._locked(timeout_s):
            rates = self._read().get(key)
            if rates is None:
                rates = await measure()
                self._write({**self._read(), key: rates})
            return rates

    @asynccontextmanager
    async def _locked(self, timeout_s: float) -> AsyncIterator[None]:
        """Hold the lock file, where there can be one; the kernel lets go of it when the process dies."""
        deadline = time.monotonic() + timeout_s
        with ExitStack() as opened:
            try:
                lock = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                opened.callback(os.close, lock)
                while not try_lock(lock):
                    if time.monotonic() > deadline:
                        raise DeadlineExceeded(
                            f"another process measures throughput for more than {timeout_s:g} s",
                            hint="set swarm.throughput to a number",
                        )
                    await asyncio.sleep(_LOCK_POLL_S)
            except OSError as error:
                self._note_unwritable(error)
            yield

    def _read(self) -> dict[str, BlockRates]:
        try:
            content = json.loads(self._path.read_bytes())
            return {key: BlockRates(**rates) for key, rates in content.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.warning("throughput_file_unreadable", file=self._path.name, error=repr(error))
            return {}

    def _write(self, rates: Mapping[str, BlockRates]) -> None:
        """Replace the file in one go, so that a reader never sees half of it."""
        content = json.dumps({key: asdict(value) for key, value in rates.items()}, indent=2)
        partial = self._path.with_name(f"{self._path.name}.partial")
        try:
            partial.write_text(content + "\n")
            partial.replace(self._path)
        except OSError as error:
            self._note_unwritable(error)

    def _note_unwritable(self, error: OSError) -> None:
        """No reason not to serve: it is measured again at the next start."""
        log.warning("throughput_file_unwritable", file=self._path.name, error=error.strerror)
