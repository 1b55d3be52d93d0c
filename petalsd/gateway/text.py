"""From tokens to the text that a reader gets: whole characters only, and none of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

# A character has four bytes at most, each of which may be a token.
_MAX_UNFINISHED: Final = 4
_REPLACEMENT: Final = "\ufffd"

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """Text that grows token by token; ``decode`` makes text of token ids.

    What a token reads like may depend on the one before it, as a space does, so each is decoded together with some
    that are written already. The bytes of a character may come one by one, so an unfinished one waits.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._context = 0  # ids before it are decoded no more
        self._written = 0  # ids before it are in the text

    def add(self, token: int) -> str:
        """What the token adds to the text; empty while a character is unfinished."""
        self._ids.append(token)
        text = self._rest()
        num_waiting = len(self._ids) - self._written
        if text.endswith(_REPLACEMENT) and num_waiting <= _MAX_UNFINISHED:
            return ""
        if text:
            self._advance()
        return text

    def end(self) -> str:
        """What is left, unfinished or not."""
        text = self._rest()
        self._advance()
        return text

    def _rest(self) -> str:
        known = self._decode(self._ids[self._context : self._written])
        return self._decode(self._ids[self._context :])[len(known) :]

    def _advance(self) -> None:
        self._context, self._written = self._written, len(self._ids)


class StopStrings:
    """Passes text on up to the one of ``stops`` that is complete first; what may be the beginning of one waits."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.is_found = False

    def add(self, text: str) -> str:
        """What is certain to belong to the text by now; nothing once a stop string was found."""
        if self.is_found:
            return ""
        self._held += text
        places = [(place + len(stop), place) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.is_found = True
            _, place = min(places)
            text, self._held = self._held[:place], ""
            return text
        split = len(self._held) - self._num_uncertain()
        text, self._held = self._held[:split], self._held[split:]
        return text

    def end(self) -> str:
        """What waited for a stop string that did not come."""
        text, self._held = self._held, ""
        return text

    def _num_uncertain(self) -> int:
        longest = max(map(len, self._stops), default=0) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
