"""A loop in a thread of its own, so that blocking code (transformers) can use the swarm."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from types import TracebackType
from typing import Any, TypeVar

from petalsd.errors import SessionClosed
from petalsd.log import use_standard_logging

T = TypeVar("T")

_STOP_TIMEOUT_S = 10.0


class ClientRuntime:
    """Runs coroutines on its loop for callers of other threads.

    ``start`` and ``stop`` once each; ``stop`` cancels what still runs. Usable as a context manager.
    """

    def __init__(self) -> None:
        # Not uvloop's, which refuses to start a process while another loop of this program starts one.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="petalsd-client", daemon=True)
        self._is_running = False
        self._process = os.getpid()
        self._last: Future[None] | None = None

    @property
    def is_running(self) -> bool:
        """Never in a process that was forked from ours: threads stay behind."""
        return self._is_running and os.getpid() == self._process

    def start(self) -> None:
        """Start the thread."""
        use_standard_logging()
        self._is_running = True
        self._thread.start()

    def run(self, job: Coroutine[Any, Any, T]) -> T:
        """Run ``job`` on the loop and wait for it. An interrupt (Ctrl-C) cancels it first."""
        if not self.is_running or threading.current_thread() is self._thread:
            job.close()
            raise SessionClosed(self._why_not())
        future = asyncio.run_coroutine_threadsafe(job, self._loop)
        try:
            return future.result()
        except CancelledError:
            if self._is_running:
                raise
            raise SessionClosed("the client was closed meanwhile") from None
        except BaseException:
            future.cancel()
            raise

    def start_soon(self, job: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Run ``job()`` on the loop, if that still runs, without waiting. For finalizers: any thread may."""
        if self.is_running:
            asyncio.run_coroutine_threadsafe(job(), self._loop)

    def stop_soon(self, job: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """``start_soon``, and then ``stop``."""
        if self.is_running:
            self._is_running = False
            self._last = asyncio.run_coroutine_threadsafe(self._stop_after(job()), self._loop)

    def stop(self) -> None:
        """Cancel what runs, end the loop and the thread; idempotent."""
        if not self.is_running:
            return
        self._is_running = False
        asyncio.run_coroutine_threadsafe(self._cancel_all(), self._loop).result(_STOP_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_TIMEOUT_S)

    def __enter__(self) -> ClientRuntime:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _why_not(self) -> str:
        if os.getpid() != self._process:
            return "the client belongs to the process that this one was forked from: make one here"
        return "called from its own loop" if self._is_running else "the client is not running"

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    async def _stop_after(self, job: Coroutine[Any, Any, object]) -> None:
        try:
            await job
        finally:
            await self._cancel_all()
            self._loop.stop()

    async def _cancel_all(self) -> None:
        """First what was interrupted ends, for which it may need the others."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        if interrupted := [task for task in tasks if task.cancelling()]:
            await asyncio.wait(interrupted, timeout=_STOP_TIMEOUT_S / 2)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
