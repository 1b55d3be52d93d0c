"""``petalsctl sessions``."""

from __future__ import annotations

import argparse

from petalsd.cli.petalsctl.context import Context
from petalsd.cli.petalsctl.exit_codes import EXIT_OK
from petalsd.cli.petalsctl.list_views import session_lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(context: Context, arguments: argparse.Namespace) -> int:
    body = context.get("/v1/sessions")
    context.answer(body, session_lines)
    return EXIT_OK
