"""A session as its user holds it: one step after the other, and an end that always gives the pages back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from petalsd.alarm import Alarm
from petalsd.engine.checks import check_step
from petalsd.engine.core import EngineCore
from petalsd.engine.kv_transfer import Chunks, CopyMark, KeysValues, Place, Transfer
from petalsd.engine.open_rows import RowHold
from petalsd.engine.session import EngineSession, StepJob
from petalsd.engine.step import SessionSpec, Step
from petalsd.engine.thread import EngineThread, check_alive
from petalsd.errors import BadRequest, DeadlineExceeded, PetalsdError, SessionClosed, SpillError
from petalsd.kvcache.sizing import KVGeometry


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """What an administrator is shown of a session.

    key                      a number of its own in this engine
    position                 tokens that each row holds
    opened_monotonic_s       when it was opened (``time.monotonic``)
    last_active_monotonic_s  when a step of it last came or was answered
    pages                    pages of the cache that hold its tokens
    """

    key: int
    spec: SessionSpec
    position: int
    opened_monotonic_s: float
    last_active_monotonic_s: float
    pages: int


class Session:
    """An open session, made by ``Engine.open_session``; ``close`` it on every path. Belongs to the loop.

    ``copied``: how far a copy of its keys and values is right, which is made beside its steps.
    """

    def __init__(
        self,
        state: EngineSession,
        core: EngineCore,
        thread: EngineThread,
        rows: RowHold,
        deadline_s: float,
        on_end: Callable[[Session], None],
    ) -> None:
        self._state = state
        self._core = core
        self._thread = thread
        self._rows = rows
        self._deadline_s = deadline_s
        self._on_end = on_end
        self._position = 0
        self.copied = CopyMark()
        self._opened_s = self._last_active_s = time.monotonic()
        self._deadline = Alarm(self._miss_deadline)
        self._answer: asyncio.Future[torch.Tensor] | None = None
        self._transfers: set[asyncio.Future[Any]] = set()  # of keys and values, on their way
        self._end_reason: str | None = None
        self._tell_end: Callable[[str], None] | None = None

    @property
    def spec(self) -> SessionSpec:
        return self._state.spec

    @property
    def position(self) -> int:
        """Tokens that each row holds after the last answered step."""
        return self._position

    def info(self) -> SessionInfo:
        """As it is after the last answered step."""
        spec, pool = self.spec, self._core.served.pool
        pages = spec.batch * len(spec.span) * pool.geometry.tokens_to_pages(self._position)
        return SessionInfo(self._state.key, spec, self._position, self._opened_s, self._last_active_s, pages)

    @property
    def end_reason(self) -> str | None:
        """Why it takes no more steps; None while it does."""
        return self._end_reason

    def when_ended(self, tell: Callable[[str], None]) -> None:
        """Call ``tell(reason)`` once the session takes no more steps, also where nobody waits for one."""
        self._tell_end = tell
        if self._end_reason is not None:
            tell(self._end_reason)

    def check(self, step: Step) -> None:
        """BadRequest where ``step`` would refuse the shapes; from any thread, and values are not looked at."""
        check_step(step, self.spec, self._position, self._core.served.hidden_size)

    async def step(self, step: Step) -> torch.Tensor:
        """Compute a step; ``[B, n, M]`` on the CPU in the model's dtype.

        BadRequest refuses it and leaves the session as it was. Any other error ends the session, and so does
        cancelling: SessionClosed (it was ended from our side), EngineError (computing failed), DeadlineExceeded.
        """
        self._check_open()
        if self._answer is not None:
            raise BadRequest("step", step.start, "the session's step before it is not answered yet")
        check_alive(self._thread)
        self.check(step)
        answer = self._answer = asyncio.get_running_loop().create_future()
        job = StepJob.of(step, answer)
        self.copied.step_begins(step)
        self._last_active_s = job.arrived_at
        self._deadline.set(self._deadline_s)
        self._thread.post(partial(self._core.submit_step, self._state, job))
        try:
            output: torch.Tensor = await answer
        except PetalsdError as error:
            self.end(error.message)
            raise
        except asyncio.CancelledError:
            self.end("a step of it was given up")
            raise
        finally:
            self._deadline.clear()
            self._answer = None
        self._position = self.copied.settled = step.start + step.hidden.shape[1]
        self._last_active_s = time.monotonic()
        return output

    # Keys and values

    @property
    def kv_geometry(self) -> KVGeometry:
        """Of its pages."""
        return self._core.served.pool.geometry

    @property
    def dtype(self) -> torch.dtype:
        """The model's, in which its keys and values go in and out."""
        return self._core.served.pool.dtype

    @property
    def chunks(self) -> Chunks:
        """How they are cut for that."""
        geometry = self.kv_geometry
        return Chunks(self.spec, geometry.num_kv_heads * geometry.head_dim * self.dtype.itemsize)

    @property
    def is_prefix_stable(self) -> bool:
        """Whether what is computed of a token depends on nothing that comes after it.

        Not where rotary angles depend on the length of the row.
        """
        return not self._core.served.rope.is_length_dependent

    async def read_kv(self, place: Place) -> KeysValues:
        """The chunk at ``place``, below ``copied.settled``, as it is when its turn comes, also beside a step.

        SessionClosed, RolledBack or another EngineError, DeadlineExceeded. SpillError ends the session.
        """
        chunk: KeysValues = await self._transfer(partial(Transfer.reading, self._state, place))
        return chunk

    async def write_kv(self, place: Place, chunk: KeysValues) -> None:
        """Fill a session while no step is under way, each block token after token, perhaps some anew.

        SessionClosed, EngineError or DeadlineExceeded. SpillError ends the session.
        """
        await self._transfer(partial(Transfer.writing, self._state, place, chunk))

    def resume_at(self, position: int) -> None:
        """Go on behind ``position`` tokens, which were all written in all blocks. SessionClosed."""
        self._check_open()
        self._position = self.copied.settled = position
        self._thread.post(partial(self._state.resume_at, position))

    def charge_to(self, peer: str) -> None:
        """Its rows and pages count to the share of ``peer`` from now on.

        Overloaded or OutOfPages when that may not hold as much, and then the caller ends it; SessionClosed.
        """
        self._rows.charge_to(peer)
        self._state.kv.charge_to(peer)

    async def _transfer(self, make: Callable[[asyncio.Future[Any]], Transfer]) -> Any:
        self._check_open()
        check_alive(self._thread)
        answer = asyncio.get_running_loop().create_future()
        self._transfers.add(answer)
        self._thread.post(partial(self._core.submit_transfer, make(answer)))
        try:
            async with asyncio.timeout(self._deadline_s):
                return await answer
        except TimeoutError:
            raise DeadlineExceeded(f"keys and values were not moved within {self._deadline_s:g} s") from None
        except SpillError as error:
            self.end(error.message)
            raise
        finally:
            self._transfers.discard(answer)

    def _check_open(self) -> None:
        if self._end_reason is not None:
            raise SessionClosed(self._end_reason)

    def _miss_deadline(self) -> None:
        if self._answer is not None and not self._answer.done():
            text = f"the step was not computed within {self._deadline_s:g} s"
            self._answer.set_exception(DeadlineExceeded(text))

    def end(self, reason: str) -> None:
        """Take no more steps; one that waits gets SessionClosed. The pages go back after the running iteration."""
        if self._end_reason is not None:
            return
        self._end_reason = reason
        self._deadline.close()
        for waiting in (self._answer, *self._transfers):
            if waiting is not None and not waiting.done():
                waiting.set_exception(SessionClosed(reason))
        self._thread.post(partial(self._core.close_session, self._state))
        self._rows.give_back()
        self._on_end(self)
        if self._tell_end is not None:
            self._tell_end(reason)

    async def close(self) -> None:
        """End the session and return when its pages are back; any number of times, also during a step.

        When this is cancelled or the device hangs, the pages still go back as soon as the running iteration ends.
        """
        self.end("the session was closed")
        await self._thread.wait_for_commands(self._deadline_s)
