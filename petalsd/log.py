"""How log lines look: structlog for ours, the standard library's routed through the same form, one line each.

Every line is an event name with fields. With ``json`` a program can wait for an event, for instance the line
with ``"event": "online"`` that the daemon writes when it serves (fields maddrs, span, peer_id).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import TextIO

import structlog
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import Processor

from petalsd.errors import PetalsdError


def configure_logging(log_format: str, level: str, stream: TextIO | None = None) -> None:
    """Send all logging to ``stream`` (standard error); ``auto`` is console on a terminal, json elsewhere."""
    out = stream or sys.stderr
    as_console = log_format == "console" or (log_format == "auto" and out.isatty())
    shared = _shared_processors()
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_rendering(as_console, colors=out.isatty()),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    set_level(level)


def use_standard_logging() -> None:
    """For a library in somebody else's program: unless that has configured structlog, events go to ``logging``,
    where they behave like any library's (warnings and worse on standard error, unless told otherwise).
    """
    if structlog.is_configured():
        return
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["event"], sort_keys=False),
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )


def set_level(level: str) -> None:
    """debug, info, warning or error; below that nothing is written."""
    logging.getLogger().setLevel(level.upper())


def adopt_loggers(names: Iterable[str]) -> None:
    """Route libraries that bring their own handlers through ours, warnings and worse; import them first."""
    for name in names:
        logger = logging.getLogger(name)
        logger.handlers = []
        logger.propagate = True
        logger.setLevel(logging.WARNING)


def error_fields(error: BaseException) -> dict[str, str]:
    """What a log line says about an error that was expected: no traceback."""
    if isinstance(error, PetalsdError):
        fields = {"error": error.message, "code": error.code}
        return fields | ({"hint": error.hint} if error.hint else {})
    return {"error": str(error) or type(error).__name__, "code": type(error).__name__}


def _shared_processors() -> list[Processor]:
    return [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        structlog.processors.StackInfoRenderer(),
    ]


def _rendering(as_console: bool, *, colors: bool) -> list[Processor]:
    if as_console:
        formatter = structlog.dev.plain_traceback
        return [
            structlog.dev.ConsoleRenderer(
                colors=colors, timestamp_key="time", sort_keys=False, exception_formatter=formatter
            )
        ]
    # Without the frames' locals: those hold activations.
    tracebacks = structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False))
    return [tracebacks, structlog.processors.JSONRenderer(default=str)]
