"""The engine's asyncio face: sessions and passes over one served span.

All methods belong to one event loop. Computing happens on the engine thread; between the two go commands one way
and answers the other (``thread``, ``outbox``).
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NoReturn

import structlog
import torch

from petalsd.engine.checks import Restriction, check_adapter, check_pass, check_session, check_span
from petalsd.engine.core import EngineCore, ServedSpan
from petalsd.engine.handle import Session, SessionInfo
from petalsd.engine.limits import EngineLimits
from petalsd.engine.observer import EngineObserver, NullObserver
from petalsd.engine.open_rows import OpenRows, RowHold
from petalsd.engine.outbox import Outbox
from petalsd.engine.passes import PassJob
from petalsd.engine.progress import Progress
from petalsd.engine.runners import RunnerFactory
from petalsd.engine.session import EngineSession
from petalsd.engine.stats import EngineStats
from petalsd.engine.step import CANARY_PEER, PassRequest, SessionSpec, Step
from petalsd.engine.thread import EngineThread, check_alive
from petalsd.errors import (
    BadRequest,
    DeadlineExceeded,
    DeviceLost,
    Draining,
    EngineError,
    NotServed,
    OutOfPages,
    Overloaded,
    PetalsdError,
)
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.session import KVRequest, KVSession
from petalsd.models.contract import Angles, Block
from petalsd.types import BlockSpan

log = structlog.get_logger(__name__)


class Engine:
    """Computes steps and passes on ``device``, with ``num_threads`` CPU threads (0: torch's own choice).

    ``observer`` is told of what clients get; ``runners`` make what computes, by default without captured graphs.
    ``device_loss`` is set when the device is lost to this process.
    """

    def __init__(
        self,
        limits: EngineLimits,
        device: torch.device,
        num_threads: int = 0,
        observer: EngineObserver | None = None,
        runners: RunnerFactory | None = None,
    ) -> None:
        self.limits = limits
        self.device = device
        self._num_threads = num_threads
        self._observer = observer or NullObserver()
        self._runners = runners or RunnerFactory(device, num_threads, limits, self._observer)
        self._progress = Progress()
        self._keys = itertools.count()
        self._thread: EngineThread | None = None
        self._core: EngineCore | None = None
        self._sessions: set[Session] = set()
        self._rows = OpenRows(limits.max_sessions, limits.max_rows_per_peer)
        self._passes: dict[int, PassJob] = {}
        self._num_probes = 0
        self.device_loss: DeviceLost | None = None
        self._is_lost = asyncio.Event()
        self._restriction: Restriction | None = None
        self._canary_turn = asyncio.Lock()  # a change of the span would take its blocks away

    async def start(self) -> None:
        """Start the engine thread; its answers come to the running loop."""
        self._progress = Progress()  # a thread that was left behind may still write to the old one
        self._thread = EngineThread(Outbox(asyncio.get_running_loop()), self._num_threads, self._note_loss)
        self._thread.start()

    async def stop(self, deadline_s: float) -> None:
        """End everything, then the thread; one that doesn't come back in time is left behind, with an error."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        pool = self.pool
        self._end_all(thread, Draining("the server is stopping"))
        if not await thread.stop(deadline_s):
            log.error("engine_thread_left_behind", deadline_s=deadline_s)
        elif pool is not None:
            pool.close()

    # What is served

    @property
    def span(self) -> BlockSpan | None:
        """The served blocks; None when there are none."""
        return self._core.served.span if self._core else None

    @property
    def pool(self) -> KVPool | None:
        return self._core.served.pool if self._core else None

    @property
    def hidden_size(self) -> int | None:
        return self._core.served.hidden_size if self._core else None

    async def measure_graphs(self, blocks: Mapping[int, Block], pool: KVPool) -> int:
        """Device memory that captured steps of these blocks take, whatever the size of ``pool``; may be 0."""
        return await self._runners.measure_graphs(blocks, pool.kv, self._running_thread())

    async def load_span(self, blocks: Mapping[int, Block], pool: KVPool, rope: Angles) -> None:
        """Serve these blocks, which are consecutive, with the pages of ``pool``, instead of those before."""
        thread = self._running_thread()
        served = ServedSpan.of(blocks, pool, rope)
        await self.drop_span(f"blocks {served.span} are served instead")
        runner = await self._runners.make(served, thread, is_idle=True)
        core = EngineCore(
            served, runner, self.limits, self.device, thread.outbox, self._progress, self._observer
        )
        thread.post(partial(thread.set_core, core))
        self._core = core

    async def change_span(self, blocks: Mapping[int, Block]) -> None:
        """Serve these blocks, which are consecutive, with the pages and sessions that there are.

        A session keeps its pages wherever its blocks stay; work on others is ended as by ``end_work``. Steps of
        new blocks are captured afterwards, one at a time beside the sessions. The restriction is lifted.
        DeadlineExceeded when the engine thread does not take the blocks over.
        """
        thread, core = self._running_thread(), self._serving_core()
        served = ServedSpan.of(blocks, core.served.pool, core.served.rope)
        runner = await self._runners.make(served, thread, is_idle=False)
        async with self._canary_turn:
            reason = f"blocks {served.span} are served instead"
            self.restrict(core.served.span.intersect(served.span), reason)
            self.end_work(reason, keeping=served.span)
            thread.post(partial(core.change_span, served, runner))
            if not await thread.wait_for_commands(self.limits.step_deadline_s):
                raise DeadlineExceeded("the engine thread did not take the new blocks over")
            self._restriction = None

    def restrict(self, kept: BlockSpan | None, reason: str) -> None:
        """Refuse new sessions and passes with Draining(reason) unless they use only ``kept`` blocks."""
        self._restriction = Restriction(kept, reason)

    def lift_restriction(self) -> None:
        """Take work for all served blocks again."""
        self._restriction = None

    def work_outside(self, kept: BlockSpan | None) -> int:
        """Sessions of clients and passes that use other blocks than ``kept``; None: all there are."""
        sessions = sum(session.spec.peer != CANARY_PEER for session in self._sessions_outside(kept))
        return sessions + len(self._passes_outside(kept))

    async def drop_span(self, reason: str) -> None:
        """Serve nothing: end all sessions with SessionClosed(reason), all passes and waits with NotServed(reason).

        Returns when the engine thread no longer touches the blocks; DeadlineExceeded when it doesn't let go.
        """
        thread, pool = self._running_thread(), self.pool
        self._end_all(thread, NotServed(reason))
        if not await thread.wait_for_commands(self.limits.step_deadline_s):
            raise DeadlineExceeded("the engine thread did not let go of the blocks it served")
        if pool is not None:
            pool.close()

    def end_work(self, reason: str, keeping: BlockSpan | None = None) -> None:
        """End sessions with SessionClosed(reason) and passes with Draining(reason); the span stays.

        Those that use only blocks of ``keeping`` go on.
        """
        for session in self._sessions_outside(keeping):
            session.end(reason)
        core, jobs = self._core, self._passes_outside(keeping)
        self._fail_passes(jobs, Draining(reason))
        if core is not None and self._thread is not None:
            for job in jobs:  # their tasks would do so later, and their blocks may go before
                self._thread.post(partial(core.passes.close, job))

    # Sessions

    async def open_session(self, spec: SessionSpec, payer: str | None = None) -> Session:
        """Reserve pages for a session, waiting for them up to ``spec.alloc_timeout_s``.

        They and its rows count to the share of ``payer``, by default the session's own peer. Raises NotServed,
        BadRequest, Draining, Overloaded (too many rows are open), OutOfPages.
        """
        core = self._serving_core()
        self._check_offered(spec)
        check_session(spec, self.limits)
        payer = payer or spec.peer
        rows = self._rows.take(payer, spec.batch)
        asked_at = time.monotonic()
        try:
            session = self._admit(core, spec, await self._reserve(core, spec, payer), rows)
        except BaseException:
            rows.give_back()
            raise
        if spec.peer != CANARY_PEER:
            self._observer.session_admitted(time.monotonic() - asked_at)
        return session

    async def _reserve(self, core: EngineCore, spec: SessionSpec, payer: str) -> KVSession:
        tokens = max(1, spec.max_tokens)  # a session of none is legal on the wire, but not in the pool
        request = KVRequest(spec.span.start, len(spec.span), spec.batch, tokens, payer)
        return await core.served.pool.reserve(request, spec.alloc_timeout_s)

    def _admit(self, core: EngineCore, spec: SessionSpec, kv: KVSession, rows: RowHold) -> Session:
        try:
            if self._core is not core or self._thread is None:
                raise NotServed(f"blocks {spec.span} are not served any more")
            self._check_offered(spec)
        except PetalsdError:  # the blocks went while the session waited for pages
            kv.close()
            raise
        state = EngineSession(next(self._keys), spec, kv)
        deadline_s = self.limits.step_deadline_s
        session = Session(state, core, self._thread, rows, deadline_s, self._sessions.discard)
        self._sessions.add(session)
        return session

    # Passes

    async def forward(self, request: PassRequest) -> torch.Tensor:
        """The states that leave the span's last block: ``[B, n, M]`` on the CPU in the model's dtype.

        Raises NotServed, BadRequest, Draining, Overloaded, EngineError, DeadlineExceeded.
        """
        if request.grad_output is not None:
            raise BadRequest("grad_outputs", list(request.grad_output.shape), "a forward pass takes none")
        (output,) = await self._run_pass(request)
        return output

    async def backward(self, request: PassRequest) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gradients of the states ``[B, n, M]`` and of the prompts ``[len(span), B, prefix, M]`` that entered.

        The second is None without prompts. Errors as for ``forward``.
        """
        if request.grad_output is None:
            raise BadRequest("grad_outputs", None, "a backward pass needs them")
        grad_hidden, *grad_prompts = await self._run_pass(request)
        return grad_hidden, grad_prompts[0] if grad_prompts else None

    def check_pass(self, request: PassRequest) -> None:
        """NotServed, BadRequest or Draining where ``forward`` or ``backward`` would refuse shapes or blocks."""
        core = self._serving_core()
        self._check_offered(request)
        check_pass(request, self.limits, core.served.hidden_size)

    async def _run_pass(self, request: PassRequest) -> list[torch.Tensor]:
        core, thread = self._serving_core(), self._running_thread()
        self.check_pass(request)
        self._check_queue(request.peer)
        job = PassJob(next(self._keys), request, asyncio.get_running_loop().create_future())
        self._passes[job.key] = job
        thread.post(partial(core.passes.submit, job))
        try:
            async with asyncio.timeout(self.limits.pass_deadline_s):
                return await job.answer
        except TimeoutError:
            raise DeadlineExceeded(
                f"the pass was not computed within {self.limits.pass_deadline_s:g} s"
            ) from None
        finally:
            self._passes.pop(job.key, None)
            thread.post(partial(core.passes.close, job))

    def _check_queue(self, peer: str) -> None:
        """Overloaded when one more pass of this peer may not wait; the canary always may."""
        num_own = sum(job.request.peer == peer for job in self._passes.values())
        is_full = len(self._passes) >= self.limits.max_queued_passes
        if peer != CANARY_PEER and (is_full or num_own >= self.limits.max_passes_per_peer):
            raise Overloaded(
                f"{len(self._passes)} forward and backward passes wait already, {num_own} of them yours",
                hint="retry later, or use another server",
            )

    # Health

    async def until_lost(self) -> NoReturn:
        """Raises DeviceLost once the device is lost to this process."""
        await self._is_lost.wait()
        assert self.device_loss is not None
        raise self.device_loss

    def _note_loss(self, error: DeviceLost) -> None:
        self.device_loss = error
        self._is_lost.set()

    def stats(self) -> EngineStats:
        num_sessions = sum(session.spec.peer != CANARY_PEER for session in self._sessions)
        captures = self._core.captures if self._core else None
        return EngineStats.of(self._progress, num_sessions, self._rows.total, len(self._passes), captures)

    def open_sessions(self) -> list[SessionInfo]:
        """The open ones of clients, the oldest first."""
        infos = [session.info() for session in self._sessions if session.spec.peer != CANARY_PEER]
        return sorted(infos, key=lambda info: info.key)

    async def self_test(self) -> None:
        """Send a canary through all served blocks, prefill and decode; EngineError unless it comes back sound.

        When sessions hold all the pages it goes without a cache.
        """
        await self._send_canary(lambda served: served)

    async def probe(self) -> None:
        """``self_test`` of one block, another one each time: whether the device works, for next to nothing.

        All blocks of a large model would be a good part of what an idle machine can do, on a CPU at least.
        """
        number, self._num_probes = self._num_probes, self._num_probes + 1
        await self._send_canary(lambda served: _block_of(served, number))

    async def _send_canary(self, choose: Callable[[BlockSpan], BlockSpan]) -> None:
        """Through the blocks that ``choose`` picks of those that are served when its turn has come."""
        async with self._canary_turn:
            await self._cross(choose(self._serving_core().served.span))

    async def _cross(self, span: BlockSpan) -> None:
        hidden_size = self._serving_core().served.hidden_size
        canary = torch.linspace(-1.0, 1.0, 2 * hidden_size).view(1, 2, hidden_size)
        try:
            session = await self.open_session(SessionSpec(span, batch=1, max_tokens=3, peer=CANARY_PEER))
        except (OutOfPages, Overloaded):
            answers = [await self.forward(PassRequest(span, canary, peer=CANARY_PEER))]
        else:
            # A failed or cancelled step ends its session; to close it would be to wait for the device again.
            answers = [await session.step(Step(canary, 0)), await session.step(Step(canary[:, :1], 2))]
            await session.close()
        if not all(bool(torch.isfinite(answer).all()) for answer in answers):
            raise EngineError(f"the self-test's states are not finite after blocks {span}")

    # Inside

    def _running_thread(self) -> EngineThread:
        if self._thread is None:
            raise Draining("the engine is not running")
        return self._thread

    def _serving_core(self) -> EngineCore:
        check_alive(self._running_thread())
        if self._core is None:
            raise NotServed("no blocks are served here now")
        return self._core

    def _end_all(self, thread: EngineThread, error: PetalsdError) -> None:
        """Refuse what comes, end what is here; takes effect on the engine thread after the running iteration."""
        core, self._core = self._core, None
        self._restriction = None
        if core is None:
            return
        core.served.pool.dismiss_waiters(error)
        for session in list(self._sessions):
            session.end(error.message)
        self._fail_passes(self._passes_outside(None), error)
        thread.post(partial(thread.set_core, None))
        thread.post(core.retire)

    def _check_offered(self, work: SessionSpec | PassRequest) -> None:
        """NotServed or Draining unless new work on these blocks is taken; the canary goes everywhere."""
        check_span(work.span, self.span)
        check_adapter(work.adapter, self._serving_core().served.adapters)
        if self._restriction is not None and work.peer != CANARY_PEER:
            self._restriction.check(work.span)

    def _sessions_outside(self, kept: BlockSpan | None) -> list[Session]:
        return [one for one in self._sessions if kept is None or not kept.covers(one.spec.span)]

    def _passes_outside(self, kept: BlockSpan | None) -> list[PassJob]:
        return [job for job in self._passes.values() if kept is None or not kept.covers(job.request.span)]

    def _fail_passes(self, jobs: Iterable[PassJob], error: PetalsdError) -> None:
        for job in jobs:
            if not job.answer.done():
                job.answer.set_exception(type(error)(error.message))


def _block_of(span: BlockSpan, number: int) -> BlockSpan:
    block = span.start + number % len(span)
    return BlockSpan(block, block + 1)
