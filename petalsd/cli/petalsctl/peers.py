"""``petalsctl peers``."""

from __future__ import annotations

import argparse

from petalsd.cli.petalsctl.context import SLOW_ANSWER_TIMEOUT_S, Context
from petalsd.cli.petalsctl.exit_codes import EXIT_OK
from petalsd.cli.petalsctl.list_views import peer_lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(context: Context, arguments: argparse.Namespace) -> int:
    body = context.get("/v1/peers", SLOW_ANSWER_TIMEOUT_S)
    context.answer(body, peer_lines)
    return EXIT_OK
