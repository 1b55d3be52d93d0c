"""What the calls of other peers and our announcements tell whoever measures them."""

from __future__ import annotations

from typing import Protocol

from petalsd.swarm.escrow import Outcome


class SwarmObserver(Protocol):
    """Called on the loop. Must be quick, and must not raise."""

    def call_began(self, method: str) -> None:
        """Another peer calls ``method``, one of ``protocol.UNARY_METHODS``, ``STREAM_METHODS`` or ours."""

    def call_failed(self, method: str, code: str) -> None:
        """It was answered with an error; ``code`` is one of ``faults.CODES``."""

    def call_abandoned(self, method: str) -> None:
        """The caller closed the stream, failed or died before the call was over."""

    def received(self, num_bytes: int) -> None:
        """A message came."""

    def sent(self, num_bytes: int) -> None:
        """A message was written."""

    def flowed(self, num_bytes: int, seconds: float, *, is_upload: bool) -> None:
        """So much of one large message passed in so long."""

    def acknowledged(self, peer: str, num_bytes: int, seconds: float) -> None:
        """Another server answered a message of ours that long after it was sent."""

    def first_answer(self, wait_s: float) -> None:
        """The first answer of a session was sent, that long after the session was asked for."""

    def prompt_began(self, tokens: int, num_reused: int) -> None:
        """A session's first step brought so many tokens; those of its beginning were in the prefix cache."""

    def pushed(self, is_delivered: bool) -> None:
        """An answer was handed on to the next server of a chain, or could not be."""

    def handed_over(self, outcome: Outcome) -> None:
        """A session that another server offered was taken or refused; or one that was taken left our custody."""

    def announced(self, is_stored: bool) -> None:
        """Our record was stored under all blocks of a span, or could not be."""


class NullObserver:
    """Looks away."""

    def call_began(self, method: str) -> None:
        pass

    def call_failed(self, method: str, code: str) -> None:
        pass

    def call_abandoned(self, method: str) -> None:
        pass

    def received(self, num_bytes: int) -> None:
        pass

    def sent(self, num_bytes: int) -> None:
        pass

    def flowed(self, num_bytes: int, seconds: float, *, is_upload: bool) -> None:
        pass

    def acknowledged(self, peer: str, num_bytes: int, seconds: float) -> None:
        pass

    def first_answer(self, wait_s: float) -> None:
        pass

    def prompt_began(self, tokens: int, num_reused: int) -> None:
        pass

    def pushed(self, is_delivered: bool) -> None:
        pass

    def handed_over(self, outcome: Outcome) -> None:
        pass

    def announced(self, is_stored: bool) -> None:
        pass
