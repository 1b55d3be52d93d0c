"""``petalsctl status``: what the daemon is doing, once or redrawn while it goes on."""

from __future__ import annotations

import argparse
import time

from petalsd.cli.petalsctl.bootstrap_view import bootstrap_lines, is_bootstrap
from petalsd.cli.petalsctl.context import Context, Document, parse, print_raw, understand
from petalsd.cli.petalsctl.exit_codes import EXIT_NO_ANSWER, EXIT_OK, EXIT_REFUSING
from petalsd.cli.petalsctl.options import seconds
from petalsd.cli.petalsctl.problems import CommandError, NoAnswer
from petalsd.cli.petalsctl.status_view import status_lines
from petalsd.cli.petalsctl.text import EMPTY, Line, Piece, advice, line
from petalsd.cli.petalsctl.units import duration

TARGET = "/v1/status"
_SERVING = "online"
_MIN_INTERVAL_S = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-w", "--watch", action="store_true", help="redraw until Ctrl-C")
    parser.add_argument(
        "--interval", type=seconds, default=1.0, metavar="S", help="between two redraws; default: %(default)s"
    )


def run(context: Context, arguments: argparse.Namespace) -> int:
    if arguments.watch:
        return _watch(context, max(arguments.interval, _MIN_INTERVAL_S))
    body = context.get(TARGET)
    context.answer(body, _lines)
    return exit_code_of(parse(body))


def _lines(document: Document) -> list[Line]:
    return bootstrap_lines(document) if is_bootstrap(document) else status_lines(document)


def exit_code_of(document: Document) -> int:
    return EXIT_OK if document.get("state") == _SERVING else EXIT_REFUSING


def _watch(context: Context, interval_s: float) -> int:
    """Until Ctrl-C, which is the usual end. A daemon that was seen once may go and come back."""
    status = EXIT_NO_ANSWER
    frame: list[Line] = []
    answered_s: float | None = None
    with context.out.hidden_cursor():
        try:
            while True:
                try:
                    body = context.get(TARGET)
                except NoAnswer as error:
                    if answered_s is None:
                        raise
                    status = EXIT_NO_ANSWER
                    _show(context, [*frame, EMPTY, *_absence(error, time.monotonic() - answered_s)], b"")
                else:
                    document = parse(body)
                    frame, answered_s = understand(_lines, document), time.monotonic()
                    status = exit_code_of(document)
                    _show(context, frame, body)
                time.sleep(interval_s)
        except KeyboardInterrupt:
            if context.out.is_terminal:
                context.out.leave()
    return status


def _show(context: Context, frame: list[Line], body: bytes) -> None:
    if context.is_json:
        if body:
            print_raw(body)
    elif context.out.is_terminal:
        context.out.draw(frame)
    else:
        context.out.show([*frame, EMPTY])


def _absence(error: CommandError, since_s: float) -> list[Line]:
    return [
        line(Piece(f"✗ {error.message}; last seen {duration(since_s)} ago", "bold bad")),
        advice(error.hint),
    ]
