"""When to try again: which failures are refusals, and how often and how long a call may go on."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import structlog

from petalsd.client.options import ClientOptions
from petalsd.errors import DeadlineExceeded, MissingBlocks, RemoteFailure, SwarmError

log = structlog.get_logger(__name__)

# What the next server would most likely refuse too. The first line is petalsd's (the code of a stream's error
# text, the class name in the repr of a unary one), the others are texts of stock Petals servers.
_REFUSED = re.compile(
    r"\bbad_request: (?!max_length = )|\bBadRequest\("
    r"|exceeds pre-allocated maximum"
    r"|greater than max_batch_size"
    r"|bytes, max cache size ="
    r"|metadata must contain int max_length"
    r"|hypo ids must be int64"
    r"|not enough values to unpack"
    r"|Batch should contain more than 0 samples"
    r"|Received \d+ prompts for \d+ backends"
    r"|adapter \S+ not found"
)

# What time does not mend at the server that says so, though another may have more memory, or take longer sessions.
_TOO_SMALL = re.compile(
    r"\bout_of_pages: .* needs more than all \d+ pages"
    r"|\bbad_request: max_length = "
    r"|Cannot allocate KV cache for \S+ tokens, max ="
)

_MAX_DOUBLINGS = 64  # of a pause: nobody waits for so many, and floats have room for a thousand

# What a call through the swarm may fail with and another server may mend.
REMOTE_ERRORS = (SwarmError, DeadlineExceeded)


def is_refusal(error: Exception) -> bool:
    """Whether a server finds fault with the request itself, as every sound one would."""
    return isinstance(error, RemoteFailure) and _REFUSED.search(error.message) is not None


def is_too_small(error: Exception) -> bool:
    """Whether a server says that it never has room for so long a session."""
    return isinstance(error, RemoteFailure) and _TOO_SMALL.search(error.message) is not None


class RetryBudget:
    """The failures of one call: says how long to wait before the next attempt, or raises the error.

    Missing blocks are not a server's failure: they are waited for until the deadline, however often. A call that
    comes back to a server that is too small for it, after no others than such, finds no larger one. What one
    server refuses another is asked once, for the first may be of another version; two do not err alike.
    """

    def __init__(self, options: ClientOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self._options = options
        self._clock = clock
        self._failures = 0
        self._too_small: list[str] = []
        self._refusal: RemoteFailure | None = None
        self._waits = 0
        self._deadline: float | None = None

    def next_delay(self, error: Exception) -> float:
        """Seconds to wait after ``error``; raises it, or a refusal before it, where it is no use to go on."""
        self._check_refusals(error)
        now = self._clock()
        if self._deadline is None:
            self._deadline = now + self._options.recovery_timeout_s
        if isinstance(error, MissingBlocks):
            self._waits += 1
            if self._waits == 1:  # or else minutes would pass without a word
                left_s = round(self._deadline - now, 1)
                log.warning("blocks_missing", error=error.message, hint=error.hint, gives_up_in_s=left_s)
            delay_s = self._backoff(self._waits)
        else:
            self._failures += 1
            delay_s = 0.0 if self._failures == 1 else self._backoff(self._failures - 1)
        spent = self._failures > self._options.max_failures or now + delay_s >= self._deadline
        if spent or self._finds_none_larger(error):
            raise error
        return delay_s

    def _check_refusals(self, error: Exception) -> None:
        if is_refusal(error):
            if self._refusal is not None:
                raise error
            assert isinstance(error, RemoteFailure)
            self._refusal = error
        elif self._refusal is not None and isinstance(error, MissingBlocks):  # nobody else could be asked
            raise self._refusal

    def _finds_none_larger(self, error: Exception) -> bool:
        if not is_too_small(error):
            return False
        assert isinstance(error, RemoteFailure)
        self._too_small.append(error.peer)
        is_again = self._too_small.count(error.peer) > 1
        return is_again and len(self._too_small) == self._failures

    def _backoff(self, attempt: int) -> float:
        doublings = min(attempt - 1, _MAX_DOUBLINGS)
        return min(self._options.min_backoff_s * 2.0**doublings, self._options.max_backoff_s)
