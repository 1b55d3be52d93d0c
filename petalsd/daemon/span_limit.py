"""How many blocks turned out to fit, where the device gave less than was counted on."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from petalsd.daemon.sizing import MemoryNeed
from petalsd.daemon.supervisor import Cause, Departure
from petalsd.daemon.warnings import WarningBoard
from petalsd.errors import EngineError
from petalsd.types import BlockSpan

log = structlog.get_logger(__name__)


class SpanLimit:
    """``most`` blocks may be served, None while no span was too large; it holds until the process ends.

    available_bytes  of the device: what is free now and what this process holds
    """

    def __init__(self, need: MemoryNeed, available_bytes: Callable[[], int], board: WarningBoard) -> None:
        self._need = need
        self._available_bytes = available_bytes
        self._board = board
        self.most: int | None = None

    def lower(self, span: BlockSpan, error: Exception, num_served: int = 0) -> Departure:
        """``span`` did not fit: allow as many blocks as the memory holds now, one fewer at least.

        Those that are served all the same, ``num_served``, fit. EngineError when not even one is left.
        """
        fitting = max(self._need.fitting_blocks(self._available_bytes(), len(span) - 1), num_served)
        if fitting == 0:
            raise EngineError(
                f"the device's memory does not hold one block of {span}",
                hint="end what else uses the device, lower engine.kv_tokens, or serve a smaller model",
            ) from error
        self.most = fitting
        log.warning("span_reduced", span=str(span), num_blocks=fitting, error=str(error).partition("\n")[0])
        self._board.set("span_reduced", f"{fitting} instead of {len(span)}")
        return Departure(Cause.OUT_OF_MEMORY, f"the device's memory holds {fitting} blocks, not {len(span)}")
