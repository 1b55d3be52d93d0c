"""What can go wrong between the command and the daemon; each problem has its exit status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from petalsd.cli.petalsctl.exit_codes import EXIT_FAILED, EXIT_NO_ANSWER, EXIT_REFUSING, EXIT_USAGE
from petalsd.errors import PetalsdError

_HTTP_UNAVAILABLE = 503


class CommandError(PetalsdError):
    """Base; ``hint`` is what to type next."""

    code = "failed"
    exit_code = EXIT_FAILED


class BadUsage(CommandError):
    code = "bad_usage"
    exit_code = EXIT_USAGE


class NoAnswer(CommandError):
    """No daemon could be asked, or it did not answer.

    is_absent     nobody listens there: it may yet be started
    is_forbidden  this user may not ask
    """

    code = "no_answer"
    exit_code = EXIT_NO_ANSWER

    def __init__(
        self, message: str, *, hint: str = "", is_absent: bool = False, is_forbidden: bool = False
    ) -> None:
        super().__init__(message, hint=hint)
        self.is_absent = is_absent
        self.is_forbidden = is_forbidden


class Refused(CommandError):
    """The daemon answered with an error; ``code`` is the daemon's own.

    acting_group  whose members may do what this user may not; None also where the daemon does not say
    """

    def __init__(self, status: int, error: Mapping[str, Any], body: bytes) -> None:
        super().__init__(
            str(error.get("message") or f"HTTP status {status}"), hint=str(error.get("hint") or "")
        )
        self.code = str(error.get("code") or "error")
        group = error.get("acting_group")
        self.acting_group = group if isinstance(group, str) else None
        self.exit_code = EXIT_REFUSING if status == _HTTP_UNAVAILABLE else EXIT_FAILED
        self.body = body


class StillWaiting(CommandError):
    """The time given for a wait is over; what was waited for may still come."""

    code = "deadline_exceeded"
    exit_code = EXIT_REFUSING
