"""``petalsctl version``: ours, and the daemon's if it answers."""

from __future__ import annotations

import argparse

from petalsd import __version__
from petalsd.cli.petalsctl.context import Context, parse, print_raw
from petalsd.cli.petalsctl.exit_codes import EXIT_OK
from petalsd.cli.petalsctl.text import Piece, line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(context: Context, arguments: argparse.Namespace) -> int:
    """The command's own version is shown even where no daemon answers."""
    if not context.is_json:
        context.out.show([line(f"petalsctl {__version__}")])
    body = context.get("/v1/version")
    if context.is_json:
        print_raw(body)
        return EXIT_OK
    version = str(parse(body).get("version", "unknown"))
    note = "" if version == __version__ else "  not the same: restart the daemon after an upgrade"
    context.out.show([line(f"petalsd   {version}", Piece(note, "busy"))])
    return EXIT_OK
