"""``petalsctl metrics``: Prometheus' text format, as a scraper gets it."""

from __future__ import annotations

import argparse

from petalsd.cli.petalsctl.context import Context, print_raw
from petalsd.cli.petalsctl.exit_codes import EXIT_OK
from petalsd.cli.petalsctl.problems import BadUsage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(context: Context, arguments: argparse.Namespace) -> int:
    if context.is_json:
        raise BadUsage("metrics have no JSON form", hint="petalsctl status --json has the main figures")
    print_raw(context.get("/metrics"))
    return EXIT_OK
