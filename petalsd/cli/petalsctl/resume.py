"""``petalsctl resume``: serve again after a drain."""

from __future__ import annotations

import argparse

from petalsd.cli.petalsctl.context import Context
from petalsd.cli.petalsctl.exit_codes import EXIT_OK
from petalsd.cli.petalsctl.text import Piece, line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(context: Context, arguments: argparse.Namespace) -> int:
    body = context.post("/v1/resume", {})
    context.answer(body, lambda _: [line(Piece("serving again", "good"))])
    return EXIT_OK
