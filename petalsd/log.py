"""How log lines look: structlog for ours, the standard library's routed through the same form, one line each.

Every line is an event name with fields; `log_limits` bounds how many there are, `redaction` what they hold. With
``json`` a program can wait for an event, for instance the line with ``"event": "online"`` that the daemon writes
when it serves (fields maddrs, span, peer_id); in the journal that is the field PETALSD_EVENT.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from petalsd.errors import PetalsdError
from petalsd.journal import MESSAGE_IDS, JournalHandler, is_journal, unwritable_line
from petalsd.log_limits import LimitedHandler, RateLimiter
from petalsd.redaction import exception_records, exception_summary, exception_text, redact


def configure_logging(log_format: str, level: str, stream: TextIO | None = None) -> None:
    """Send all logging to ``stream`` (standard error), or natively to systemd's journal.

    ``auto``: console on a terminal, journal where the service manager connected ``stream`` to it, json elsewhere.
    """
    out = stream or sys.stderr
    chosen = _form_for(out) if log_format == "auto" else log_format
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
    handler = JournalHandler() if chosen == "journal" else _LineHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                redact,
                *_rendering(chosen, colors=out.isatty()),
            ],
        )
    )
    root = logging.getLogger()
    for old in root.handlers:
        if isinstance(old, LimitedHandler):
            old.close()
    root.handlers = [LimitedHandler(handler, RateLimiter(), unlimited=MESSAGE_IDS)]
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
            redact,
            _exceptions_by(exception_text),
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


def _form_for(out: TextIO) -> str:
    if out.isatty():
        return "console"
    try:
        fd = out.fileno()
    except OSError:  # not a file: a test's, or a program's that we are a part of
        return "json"
    return "journal" if is_journal(fd, os.environ) else "json"


def _rendering(form: str, *, colors: bool) -> list[Processor]:
    if form == "console":
        console = structlog.dev.ConsoleRenderer(
            colors=colors,
            timestamp_key="time",
            sort_keys=False,
            exception_formatter=structlog.dev.plain_traceback,
        )
        return [_exceptions_by(exception_text), console]
    if form == "journal":
        exceptions = [
            _exceptions_by(lambda error: (exception_summary(error), exception_text(error))),
            _with_error,
        ]
    else:
        exceptions = [_exceptions_by(exception_records)]
    return [*exceptions, structlog.processors.JSONRenderer()]


def _exceptions_by(show: Callable[[BaseException], Any]) -> Processor:
    """Never Python's or structlog's own rendering: frames hold activations, and messages may."""
    return structlog.processors.ExceptionRenderer(lambda exc_info: show(exc_info[1]))


def _with_error(logger: WrappedLogger, name: str, event_dict: EventDict) -> EventDict:
    """What the journal's line says of an exception beside the field with all of it."""
    if "exception" in event_dict:
        summary, event_dict["exception"] = event_dict["exception"]
        event_dict.setdefault("error", summary)
    return event_dict


class _LineHandler(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:
        """Called while the error is handled. A stream that is gone is nobody's loss."""
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError):
            self.stream.write(f"{unwritable_line(record, error)}\n")
