"""Every error that petalsd raises on purpose.

PetalsdError
├── ConfigError          a configuration value is wrong; the daemon exits 78
├── AddressUnavailable   an address to listen on cannot be had now; the daemon exits 75
├── ModelError           the model cannot be served
│   ├── UnsupportedModel     its architecture is outside what this version computes
│   └── WeightsError         files are missing, damaged, of a refused kind, or do not fit the disk
├── BadRequest           a peer sent something wrong: names the field, its value and the rule
├── NotServed            the blocks asked for are not served here (any more)
├── NotAllowed           the peer may not use this server
├── OutOfPages           the KV pool cannot hold the session, now or within the time allowed
├── Overloaded           as many sessions or passes as are allowed are already here
├── Conflict             an administrator asked for something that the daemon's state does not allow now
├── Draining             new sessions are refused: the daemon is draining, moving or stopping
├── SessionClosed        the session was ended from our side, with the reason
├── SessionMoved         the session was handed to another server, where its client may go on
├── DeadlineExceeded     a wait reached its deadline
├── EngineError          computing failed on our side; the session is lost, the daemon goes on
│   └── SpillError           the disk failed under the attention cache of idle sessions
├── DeviceLost           the device answers nothing any more; only another process can use it: exit 74
├── KVPoolError          an invariant of the page pool is broken: a bug here
└── SwarmError           the swarm cannot do what was asked
    ├── MissingBlocks        no server holds some blocks
    └── RemoteFailure        another peer failed or answered nonsense

``str(error)`` is what another peer sees and holds no secrets, paths or tracebacks; ``hint`` says what to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable


class PetalsdError(Exception):
    """Base of the tree; ``code`` is stable and machine-readable, ``hint`` tells the reader what to do."""

    code = "error"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.code}: {self.message}"
        return f"{text} ({self.hint})" if self.hint else text


def shortened(value: object) -> str:
    """As Python writes it, at most 120 characters; what a peer sends may be long, so not all of it is written."""
    try:
        shown = repr(value[:120] if isinstance(value, str | bytes | list | tuple) else value)
    except RecursionError:
        shown = f"a {type(value).__name__} nested too deeply to be shown"
    return shown if len(shown) <= 120 else shown[:117] + "..."


class ConfigError(PetalsdError):
    code = "bad_config"


class AddressUnavailable(PetalsdError):
    code = "address_unavailable"


class ModelError(PetalsdError):
    code = "model_error"


class UnsupportedModel(ModelError):
    code = "unsupported_model"


class WeightsError(ModelError):
    code = "weights_error"


class BadRequest(PetalsdError):
    """A remote value that breaks a rule: ``field`` names it, ``value`` is shown shortened."""

    code = "bad_request"

    def __init__(self, field: str, value: object, rule: str) -> None:
        super().__init__(f"{field} = {shortened(value)}: {rule}")
        self.field = field


class NotServed(PetalsdError):
    code = "not_served"


class NotAllowed(PetalsdError):
    code = "not_allowed"


class OutOfPages(PetalsdError):
    code = "out_of_pages"


class Overloaded(PetalsdError):
    code = "overloaded"


class Conflict(PetalsdError):
    code = "conflict"


class Draining(PetalsdError):
    code = "draining"


class SessionClosed(PetalsdError):
    code = "session_closed"


class SessionMoved(PetalsdError):
    """``peer`` (base58 PeerID) holds the session for whoever opened it and shows the ``ticket``."""

    code = "session_moved"
    _TEXT = re.compile(r"session_moved: the session goes on at (\w{32,64}) \(ticket ([\w-]{16,128})\)")

    def __init__(self, peer: str, ticket: str) -> None:
        super().__init__(f"the session goes on at {peer}", hint=f"ticket {ticket}")
        self.peer = peer
        self.ticket = ticket

    @classmethod
    def parse(cls, text: str) -> SessionMoved | None:
        """What ``str`` made of one; None for any other text."""
        match = cls._TEXT.fullmatch(text)
        return None if match is None else cls(match[1], match[2])


class DeadlineExceeded(PetalsdError):
    code = "deadline_exceeded"


class EngineError(PetalsdError):
    code = "engine_error"


class SpillError(EngineError):
    code = "spill_error"


class DeviceLost(PetalsdError):
    """``error`` is the driver's name for it and ``number`` its number; ``text`` is what the driver says."""

    code = "device_lost"

    def __init__(self, error: str, number: int, text: str) -> None:
        super().__init__(
            f"{error} ({number}): {text}",
            hint="the process starts anew; petalsctl doctor and the kernel's log (NVRM: Xid) have more",
        )
        self.error = error
        self.number = number


class KVPoolError(PetalsdError):
    code = "kv_pool_error"


class SwarmError(PetalsdError):
    code = "swarm_error"


class MissingBlocks(SwarmError):
    """No usable server holds these blocks of ``model``, which is its DHT prefix."""

    code = "missing_blocks"

    def __init__(self, blocks: Iterable[int], model: str, adapter: str | None = None) -> None:
        self.blocks = sorted(blocks)
        with_adapter = "" if adapter is None else f" with adapter {adapter}"
        super().__init__(
            f"no server holds blocks {_ranges(self.blocks)} of {model}{with_adapter}",
            hint="wait for a server that serves them, or start one; servers may call the model otherwise",
        )


class RemoteFailure(SwarmError):
    """A peer failed; ``peer`` is its base58 PeerID."""

    code = "remote_failure"

    def __init__(self, peer: str, message: str) -> None:
        super().__init__(f"{peer}: {message}")
        self.peer = peer


def _ranges(blocks: list[int]) -> str:
    """[0, 1, 2, 5] -> "0:3, 5:6"."""
    parts: list[str] = []
    start = previous = None
    for block in [*blocks, None]:
        if start is None or previous is None:
            start = block
        elif block != previous + 1:
            parts.append(f"{start}:{previous + 1}")
            start = block
        previous = block
    return ", ".join(parts)
