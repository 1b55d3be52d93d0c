"""``petalsctl peers``."""

from __future__ import annotations

import argparse

from petalsd.cli.petalsctl.bootstrap_view import swarm_lines
from petalsd.cli.petalsctl.context import SLOW_ANSWER_TIMEOUT_S, Context, Document
from petalsd.cli.petalsctl.exit_codes import EXIT_OK
from petalsd.cli.petalsctl.list_views import peer_lines
from petalsd.cli.petalsctl.text import Line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(context: Context, arguments: argparse.Namespace) -> int:
    body = context.get("/v1/peers", SLOW_ANSWER_TIMEOUT_S)
    context.answer(body, _lines)
    return EXIT_OK


def _lines(document: Document) -> list[Line]:
    """A bootstrap node knows of all models, a server of its own."""
    return swarm_lines(document) if "models" in document else peer_lines(document)
