"""What sessions that were handed to us may take of this server until their clients come for them.

Whose session it is, only the giver says. So what nobody has come for yet is charged to the giver: it has a share
of its own, and all givers together leave at least half of the server to clients that are here.
"""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from petalsd.errors import Overloaded


class Outcome(enum.Enum):
    """What became of a session that was offered to us, and then of one that was taken.

    TAKEN          it waits for its client
    UNKNOWN_GIVER  refused: the directory does not list the giver as a server of its blocks
    OVER_SHARE     refused: the giver, or all of them, have as much here as they may
    NO_ROOM        refused: there is no room for any such session
    FAILED         refused for another reason, or it did not arrive whole
    CLAIMED        its client goes on with it
    OVER_CLIENTS   its client came, but may not hold as much here
    EXPIRED        its client did not come in time
    ENDED          it ended before its client came
    """

    TAKEN = "taken"
    UNKNOWN_GIVER = "unknown_giver"
    OVER_SHARE = "over_share"
    NO_ROOM = "no_room"
    FAILED = "failed"
    CLAIMED = "claimed"
    OVER_CLIENTS = "over_clients_share"
    EXPIRED = "expired"
    ENDED = "ended"


class EscrowFull(Overloaded):
    """A giver, or all of them together, have left as much here as they may."""


class Amount(NamedTuple):
    """Of sessions: how many, their rows, and the pages that they are promised."""

    sessions: int
    rows: int
    pages: int

    def __str__(self) -> str:
        return f"{self.sessions} sessions, {self.rows} rows and {self.pages} pages"

    def plus(self, other: Amount) -> Amount:
        return Amount(*(one + more for one, more in zip(self, other, strict=True)))

    def minus(self, other: Amount) -> Amount:
        return Amount(*(one - less for one, less in zip(self, other, strict=True)))

    def is_within(self, bound: Amount) -> bool:
        return all(one <= most for one, most in zip(self, bound, strict=True))


NOTHING = Amount(0, 0, 0)


@dataclass(frozen=True, slots=True)
class EscrowLimits:
    """``num_*`` sessions, and shares of the rows that may be open and of the pages that can be promised.

    Those of one giver hold but for its first session: a share forbids no session that all givers may have.
    """

    num_per_giver: int = 64
    num_of_all: int = 256
    share_per_giver: float = 0.25
    share_of_all: float = 0.5


class Deposit:
    """What one session takes of its giver's share until it is ``released``."""

    def __init__(self, escrow: Escrow, giver: str, amount: Amount) -> None:
        self._escrow = escrow
        self._giver = giver
        self._amount = amount

    def release(self) -> None:
        """Any number of times."""
        amount, self._amount = self._amount, NOTHING
        self._escrow._give_back(self._giver, amount)


class Escrow:
    """``whole`` is what the server has now: rows that may be open, and pages; its ``sessions`` does not count."""

    def __init__(self, whole: Callable[[], Amount], limits: EscrowLimits) -> None:
        self._whole = whole
        self._limits = limits
        self._held: defaultdict[str, Amount] = defaultdict(lambda: NOTHING)

    @property
    def held(self) -> Amount:
        """Of all givers; sessions that are still being received count too."""
        total = NOTHING
        for amount in self._held.values():
            total = total.plus(amount)
        return total

    def take_in(self, giver: str, amount: Amount) -> Deposit:
        """Count a session to its giver from now on. EscrowFull when that is more than it, or all, may have."""
        limits, own = self._limits, self._held.get(giver, NOTHING)
        if own.sessions:
            self._check("yours", own, amount, limits.num_per_giver, limits.share_per_giver)
        self._check("all givers", self.held, amount, limits.num_of_all, limits.share_of_all)
        self._held[giver] = own.plus(amount)
        return Deposit(self, giver, amount)

    def _check(self, whose: str, held: Amount, more: Amount, num_sessions: int, share: float) -> None:
        whole = self._whole()
        bound = Amount(num_sessions, int(share * whole.rows), int(share * whole.pages))
        if not held.plus(more).is_within(bound):
            raise EscrowFull(
                f"the session needs {more.rows} rows and {more.pages} pages; of {whose}, {held} wait for their "
                f"clients here, and at most {bound} may",
                hint="use another server, or wait until clients have come",
            )

    def _give_back(self, giver: str, amount: Amount) -> None:
        left = self._held[giver].minus(amount)
        if left.sessions:
            self._held[giver] = left
        else:
            del self._held[giver]
