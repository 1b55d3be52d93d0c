"""``petalsctl wait``: until the daemon serves, is drained, or is gone."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

from petalsd.cli.petalsctl.bootstrap_view import is_bootstrap
from petalsd.cli.petalsctl.context import Context, Document, parse, print_raw, understand
from petalsd.cli.petalsctl.exit_codes import EXIT_OK
from petalsd.cli.petalsctl.options import seconds
from petalsd.cli.petalsctl.problems import CommandError, NoAnswer, StillWaiting
from petalsd.cli.petalsctl.status_view import short_status
from petalsd.cli.petalsctl.text import Line, Piece, line
from petalsd.cli.petalsctl.units import duration

_TARGET = "/v1/status"
_POLL_S = 0.25
_DEFAULT_TIMEOUT_S = 600.0
_GONE = ("stopped", "failed")


@dataclass(frozen=True, slots=True)
class _Goal:
    name: str
    state: str | None  # None: no daemon answers


_READY = _Goal("serving", "online")
_DRAINED = _Goal("drained", "drained")
_OFFLINE = _Goal("gone", None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    goal = parser.add_mutually_exclusive_group()
    goal.set_defaults(goal=_READY)
    add = goal.add_argument
    add("--ready", dest="goal", action="store_const", const=_READY, help="until it serves (default)")
    add("--drained", dest="goal", action="store_const", const=_DRAINED, help="until no session is left")
    add("--offline", dest="goal", action="store_const", const=_OFFLINE, help="until it has ended")
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=_DEFAULT_TIMEOUT_S,
        metavar="S",
        help="give up after this many seconds; default: %(default)g",
    )


def run(context: Context, arguments: argparse.Namespace) -> int:
    wait = _Wait(context, arguments.goal, arguments.timeout)
    with context.err.hidden_cursor():
        try:
            body = wait.run()
        finally:
            if context.err.is_terminal:
                context.err.erase()
    if context.is_json and body:
        print_raw(body)
    elif not context.is_json:
        context.out.show([wait.outcome()])
    return EXIT_OK


class _Wait:
    """Asks again and again; shows on standard error what is waited for, where that is a terminal."""

    def __init__(self, context: Context, goal: _Goal, timeout_s: float) -> None:
        self._context = context
        self._goal = goal
        self._timeout_s = timeout_s
        self._was_draining = False
        self._last: Document | None = None

    def run(self) -> bytes:
        """The last document, empty if the goal was the daemon's end. StillWaiting or NoAnswer in the end."""
        deadline_s = time.monotonic() + self._timeout_s
        while True:
            absence: NoAnswer | None = None
            body = b""
            try:
                body = self._context.get(_TARGET, max(0.1, min(5.0, deadline_s - time.monotonic())))
            except NoAnswer as error:
                absence = error
                if error.is_forbidden:
                    raise
            if self._is_reached(body, absence):
                return body
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise absence or self._still()
            self._show(absence, left_s)
            time.sleep(min(_POLL_S, left_s))

    def outcome(self) -> Line:
        return line(Piece(self._goal.name, "good"))

    def _is_reached(self, body: bytes, absence: NoAnswer | None) -> bool:
        """CommandError when it cannot be reached any more."""
        if absence is not None:
            return self._goal.state is None and absence.is_absent
        self._last = document = parse(body)
        state = document.get("state")
        if self._goal is _DRAINED and is_bootstrap(document):
            raise CommandError("this is a bootstrap node, which has no sessions and is never drained")
        if self._goal.state is None:
            return state in _GONE
        if state in _GONE:
            raise CommandError(f"the daemon has {state}: {document.get('reason') or 'no reason given'}")
        if self._goal is _DRAINED and self._was_draining and state == "online":
            raise CommandError("the drain was called off: the daemon serves again")
        self._was_draining |= state == "draining"
        return state == self._goal.state

    def _still(self) -> CommandError:
        state = (self._last or {}).get("state", "unknown")
        return StillWaiting(
            f"not {self._goal.name} after {duration(self._timeout_s)}: it is {state}",
            hint=f"{self._context.command('status')} says more; nothing was called off",
        )

    def _show(self, absence: NoAnswer | None, left_s: float) -> None:
        if not self._context.err.is_terminal:
            return
        if absence is not None or self._last is None:
            now = line(absence.message if absence is not None else "")
        else:
            now = understand(lambda document: [short_status(document)], self._last)[0]
        waiting = Piece(f"  (waiting {duration(left_s)} more)", "dim")
        self._context.err.draw([line(*now.pieces, waiting)])
