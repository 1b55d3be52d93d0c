"""``petalsctl reload``: the daemon reads its configuration again; a wrong file changes nothing."""

from __future__ import annotations

import argparse

from petalsd.cli.petalsctl.context import Context, Document
from petalsd.cli.petalsctl.exit_codes import EXIT_OK
from petalsd.cli.petalsctl.operation_view import reload_lines
from petalsd.cli.petalsctl.text import Line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(context: Context, arguments: argparse.Namespace) -> int:
    body = context.post("/v1/reload", {})

    def lines(outcome: Document) -> list[Line]:
        return reload_lines(outcome, context.instance.restart_command)

    context.answer(body, lines)
    return EXIT_OK
