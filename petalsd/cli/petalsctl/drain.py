"""``petalsctl drain``: let running sessions finish, refuse new ones."""

from __future__ import annotations

import argparse

from petalsd.cli.petalsctl.context import Context, Document
from petalsd.cli.petalsctl.exit_codes import EXIT_INTERRUPTED, EXIT_OK
from petalsd.cli.petalsctl.following import Followed, goes_on
from petalsd.cli.petalsctl.options import seconds
from petalsd.cli.petalsctl.status_view import drain_text
from petalsd.cli.petalsctl.text import Line, Piece, advice, line

_TARGET = "/v1/drain"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--deadline",
        type=seconds,
        metavar="S",
        help="sessions that are left after this many seconds are ended; default: daemon.drain_deadline_s",
    )
    parser.add_argument("--wait", action="store_true", help="show the sessions left until the last one ended")


def run(context: Context, arguments: argparse.Namespace) -> int:
    body = {"deadline_s": arguments.deadline, "wait": arguments.wait}
    if not arguments.wait:
        context.answer(context.post(_TARGET, body), lambda _: _begun(context))
        return EXIT_OK
    followed = Followed(context, _TARGET, body)
    try:
        progress = followed.run()
    except KeyboardInterrupt:
        followed.leave(
            goes_on(
                f"the drain goes on{_left(followed.last)}",
                f"{context.command('wait --drained')} shows it again",
                f"{context.command('resume')} calls it off",
            )
        )
        return EXIT_INTERRUPTED
    if not context.is_json:
        context.out.show([line(Piece("drained", "good"), f": {progress.get('outcome')}")])
    return EXIT_OK


def _begun(context: Context) -> list[Line]:
    return [
        line(Piece("draining", "busy"), ": new sessions are refused from now on"),
        advice(f"{context.command('wait --drained')} waits for the last session"),
    ]


def _left(progress: Document | None) -> str:
    if progress is None:
        return " if it has begun"
    return f": {drain_text(progress.get('sessions_left') or 0, progress.get('deadline_left_s'))}"
