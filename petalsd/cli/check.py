"""``petalsd check``: validates all that can be validated without serving; exit 78 when something is wrong."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from petalsd.cli.exit_codes import EXIT_BAD_CONFIG, EXIT_OK
from petalsd.cli.options import add_config_arguments, config_choice
from petalsd.cli.output import say
from petalsd.imports import heavy_imports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object per finding and line")


def run(arguments: argparse.Namespace) -> int:
    choice = config_choice(arguments)
    config = choice.load().config
    with heavy_imports():  # late: a bad file is reported without waiting for them
        from petalsd.daemon.preflight import inspect

    is_ok = True
    for finding in inspect(config, choice.paths):
        is_ok &= finding.is_ok
        if arguments.json:
            print(json.dumps(asdict(finding)), flush=True)
        else:
            print(f"{'ok ' if finding.is_ok else 'BAD'}  {finding.name:<16} {finding.text}", flush=True)
    if not is_ok:
        say("petalsd: this configuration would not serve")
    return EXIT_OK if is_ok else EXIT_BAD_CONFIG
