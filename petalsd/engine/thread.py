"""The one thread that owns the device: it takes commands between iterations and iterates while there is work."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from functools import partial

import structlog
import torch

from petalsd.device_faults import device_loss
from petalsd.engine.core import EngineCore
from petalsd.engine.outbox import Outbox
from petalsd.errors import DeviceLost, EngineError

log = structlog.get_logger(__name__)

Command = Callable[[], None]


class EngineThread:
    """Runs commands in the order they were posted, and iterates the core in between.

    ``num_threads`` is how many threads torch's operators use; 0 leaves torch's choice. ``failure`` is set when
    a bug kept it from iterating or the device is lost: it still obeys commands, so that everything can be taken
    down, but computes no more. ``on_lost`` is called on the loop when the device is.
    """

    def __init__(
        self, outbox: Outbox, num_threads: int, on_lost: Callable[[DeviceLost], None] = lambda error: None
    ) -> None:
        self.outbox = outbox
        self._num_threads = num_threads
        self._on_lost = on_lost
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._core: EngineCore | None = None
        self._failed_core: EngineCore | None = None
        self._is_stopping = False
        self.failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="petalsd-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, command: Command) -> None:
        """Run ``command`` on the thread before its next iteration; from any thread. Not after ``stop``."""
        self._commands.put(command)

    async def wait_for_commands(self, timeout_s: float) -> bool:
        """Wait until everything posted so far was done; False when it was not in time."""
        if self._is_stopping:
            return True
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.post(partial(self.outbox.put, done, None))
        try:
            async with asyncio.timeout(timeout_s):
                await done
        except TimeoutError:
            log.error("engine_not_answering", timeout_s=timeout_s)
            return False
        return True

    def set_core(self, core: EngineCore | None) -> None:
        """Command: iterate this core from now on."""
        self._core, self._failed_core = core, None

    async def stop(self, timeout_s: float) -> bool:
        """Leave after the commands posted so far; False when the running iteration did not end in time."""
        has_ended = await self.wait_for_commands(timeout_s)
        self._is_stopping = True
        self.post(_wake_up)
        if has_ended:
            await asyncio.get_running_loop().run_in_executor(None, self._thread.join, timeout_s)
        return has_ended

    def _run(self) -> None:
        if self._num_threads:
            torch.set_num_threads(self._num_threads)
        while not self._is_stopping:
            try:
                self._turn()
            except Exception as error:
                self._give_up(error)
        while not self._commands.empty():  # somebody may wait for these
            self._obey(self._commands.get())
        self.outbox.flush()

    def _turn(self) -> None:
        """One command, or one iteration and what is done between two."""
        command, core = self._next_command(), self._core
        if command is not None:
            self._obey(command)
            if self._failed_core is not None and self.failure is not None:
                self._failed_core.fail_all(self.failure)  # what was posted before anybody could know
        elif core is not None:
            if core.has_work:
                self._iterate(core)
            if core is self._core:
                core.capture_next()

    def _give_up(self, error: Exception) -> None:
        """It would come back at every turn: end what is under way, and compute no more."""
        if isinstance(error, DeviceLost):
            log.critical("device_lost", error=error.error, number=error.number, exc_info=error)
            self.outbox.call(self._on_lost, error)
        else:
            log.error("engine_failed", exc_info=error)
        core, self._core = self._core, None
        self.failure = error
        if core is not None:
            self._failed_core = core
            core.fail_all(error)
            self.outbox.flush()

    def _next_command(self) -> Command | None:
        """What was posted next, waiting for it while there is nothing to do or a batch gathers; None: go on."""
        commands, core = self._commands, self._core
        if commands.empty():
            self.outbox.flush()
            if core is not None and (core.has_work or core.has_captures):
                pause_s = core.pause_s()
                try:
                    return commands.get(timeout=pause_s) if pause_s > 0 else None
                except queue.Empty:
                    return None
        return commands.get()

    def _obey(self, command: Command) -> None:
        try:
            command()
        except Exception as error:
            if (loss := device_loss(error)) is not None:
                self._give_up(loss)
            else:
                log.exception("engine_command_failed")

    def _iterate(self, core: EngineCore) -> None:
        """The top of the engine: a bug below ends what is under way, not the thread."""
        try:
            core.iterate()
        except Exception as error:
            if (loss := device_loss(error)) is not None:
                self._give_up(loss)
                return
            log.exception("engine_iteration_failed")
            core.fail_all(error)
        core.report()
        self.outbox.flush()


def check_alive(thread: EngineThread) -> None:
    """EngineError when the thread has given up: what is posted to it would never be computed."""
    if thread.failure is not None:
        raise EngineError(
            f"the engine has failed ({type(thread.failure).__name__}) and waits for its restart"
        )


def _wake_up() -> None:
    """A command that only ends the wait for one."""
