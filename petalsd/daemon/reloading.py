"""A reload from start to end, for SIGHUP and the control socket alike: all of the file or nothing of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from petalsd.daemon.detached import run_detached
from petalsd.daemon.service import Service
from petalsd.daemon.settings import Reload, Settings
from petalsd.daemon.warnings import WarningBoard
from petalsd.errors import ConfigError
from petalsd.log import error_fields

log = structlog.get_logger(__name__)


_MAX_SHOWN = 3


class Reloader:
    """Reads the configuration again; ``on_reload`` is called when the new one is in force, and logs something."""

    def __init__(
        self,
        settings: Settings,
        on_reload: Callable[[], None] | None,
        service: Service,
        board: WarningBoard,
    ) -> None:
        self._settings = settings
        self._on_reload = on_reload
        self._service = service
        self._board = board
        self._lock = asyncio.Lock()

    async def reload(self) -> Reload:
        """ConfigError says what is wrong, and then everything is as before."""
        async with self._lock:
            self._service.reloading()
            try:
                outcome = await run_detached(lambda _: self._settings.reload(), "petalsd-reload")
            except ConfigError as error:
                log.error("reload_refused", **error_fields(error))
                self._board.set("reload_refused", _problems_of(error))
                raise
            finally:
                self._service.reloaded()
        # Where nothing changed, the one line that matters is what comes of the look at the placement, if any.
        is_told = not (outcome.applied or outcome.pending or self._on_reload is None)
        note = log.debug if is_told else log.info
        note("reloaded", applied=outcome.applied, needs_restart=outcome.pending)
        self._board.clear("reload_refused", "restart_needed")
        if outcome.pending:
            self._board.set("restart_needed", ", ".join(outcome.pending))
        if self._on_reload is not None:
            self._on_reload()
        return outcome

    async def run(self, asked: asyncio.Event) -> None:
        """Reload whenever ``asked`` is set; a bad file is the administrator's to mend, and no reason to end."""
        while True:
            await asked.wait()
            asked.clear()
            try:
                await self.reload()
            except ConfigError:
                continue
            except Exception:  # a bug; the next reload may find what it can read
                log.exception("reload_failed")


def _problems_of(error: ConfigError) -> str:
    """The first ones in a line; the journal has them all."""
    first, *more = [line.strip() for line in error.message.splitlines()]
    problems = more or [first]
    rest = len(problems) - _MAX_SHOWN
    return "; ".join(problems[:_MAX_SHOWN]) + (f"; and {rest} more" if rest > 0 else "")
