"""``petalsctl sessions``."""

from __future__ import annotations

import argparse

from petalsd.cli.petalsctl.context import Context, parse, understand
from petalsd.cli.petalsctl.exit_codes import EXIT_OK
from petalsd.cli.petalsctl.list_views import session_lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(context: Context, arguments: argparse.Namespace) -> int:
    body = context.get("/v1/sessions")
    context.answer(body, understand(session_lines, parse(body)))
    return EXIT_OK
