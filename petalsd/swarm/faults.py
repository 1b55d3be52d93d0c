"""What another peer is told when a call fails: the text of our own errors, and nothing of the rest."""

from __future__ import annotations

import secrets

import structlog

from petalsd.errors import (
    BadRequest,
    DeadlineExceeded,
    Draining,
    EngineError,
    NotAllowed,
    NotServed,
    OutOfPages,
    Overloaded,
    SessionClosed,
    SessionMoved,
    SpillError,
)

log = structlog.get_logger(__name__)

_PUBLIC = (
    BadRequest,
    DeadlineExceeded,
    Draining,
    EngineError,
    NotAllowed,
    NotServed,
    OutOfPages,
    Overloaded,
    SessionClosed,
    SessionMoved,
    SpillError,
)
_INTERNAL = "internal_error"
CODES = frozenset({*(kind.code for kind in _PUBLIC), _INTERNAL})


class CallFailed(Exception):
    """Raised into hivemind's unary handlers, which send ``repr`` of what they catch."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._text = text

    def __repr__(self) -> str:
        return self._text


def wire_code(error: BaseException) -> str:
    """The code that the peer is told, one of ``CODES``."""
    if isinstance(error, _PUBLIC):
        return error.code
    return DeadlineExceeded.code if isinstance(error, TimeoutError) else _INTERNAL


def wire_text(error: BaseException, method: str, peer: str) -> str:
    """The text for the peer. Errors that are not meant for it go to the log under the id that it gets."""
    if isinstance(error, _PUBLIC):
        note = log.debug if isinstance(error, BadRequest | NotAllowed | NotServed) else log.info
        note("call_refused", method=method, peer=peer, code=error.code, error=error.message)
        return str(error)
    if isinstance(error, TimeoutError):
        return f"{wire_code(error)}: the call took too long"
    fault_id = secrets.token_hex(4)
    log.error("call_failed", method=method, peer=peer, fault_id=fault_id, exc_info=error)
    return f"{wire_code(error)}: see the server's log for {fault_id}"
