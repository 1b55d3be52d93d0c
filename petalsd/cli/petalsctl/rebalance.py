"""``petalsctl rebalance``: choose blocks again; ``--dry-run`` only says what would come of it."""

from __future__ import annotations

import argparse

from petalsd.cli.petalsctl.context import Context, Document
from petalsd.cli.petalsctl.exit_codes import EXIT_INTERRUPTED, EXIT_OK
from petalsd.cli.petalsctl.following import Followed, goes_on
from petalsd.cli.petalsctl.operation_view import plan_lines
from petalsd.cli.petalsctl.options import span
from petalsd.cli.petalsctl.text import Line, Piece, advice, line

_TARGET = "/v1/rebalance"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--to",
        type=span,
        metavar="A:B",
        help="these blocks, whatever the swarm needs; default: the best ones",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="show the proposal, change nothing")
    how.add_argument("--wait", action="store_true", help="show the move until it is done")


def run(context: Context, arguments: argparse.Namespace) -> int:
    if arguments.wait:
        return _follow(context, arguments.to)
    body = context.post(_TARGET, {"to": arguments.to, "dry_run": arguments.dry_run, "wait": False})

    def lines(plan: Document) -> list[Line]:
        shown = plan_lines(plan, is_dry_run=arguments.dry_run)
        if plan["would_move"] and not arguments.dry_run:
            shown.append(advice(f"{context.command('status --watch')} shows the move"))
        return shown

    context.answer(body, lines)
    return EXIT_OK


def _follow(context: Context, to: str | None) -> int:
    followed = Followed(context, _TARGET, {"to": to, "dry_run": False, "wait": True})
    try:
        progress = followed.run()
    except KeyboardInterrupt:
        followed.leave(goes_on("the move goes on", f"{context.command('status --watch')}   shows it"))
        return EXIT_INTERRUPTED
    if not context.is_json:
        context.out.show([line(Piece("done", "good"), f": {progress.get('outcome')}")])
    return EXIT_OK
