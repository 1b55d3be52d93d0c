"""``petalsctl generate``: as ``petalsd generate``, with the model and the swarm of the running daemon."""

from __future__ import annotations

import argparse

from petalsd.cli import generate
from petalsd.cli.petalsctl.bootstrap_view import is_bootstrap
from petalsd.cli.petalsctl.context import Context, parse
from petalsd.cli.petalsctl.problems import CommandError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    generate.add_arguments(parser, asks_daemon=True)


def run(context: Context, arguments: argparse.Namespace) -> int:
    """What the command line leaves open is asked of the daemon."""
    if arguments.model is None or arguments.peers is None:
        status = parse(context.get("/v1/status"))
        if is_bootstrap(status) and arguments.model is None:
            raise CommandError(
                "this is a bootstrap node, which serves no model",
                hint=context.command("generate PROMPT --model MODEL"),
            )
        served = status.get("model") or {}
        arguments.model = arguments.model or served["source"]
        if arguments.peers is None:
            arguments.peers = status["maddrs"]
            arguments.dht_prefix = arguments.dht_prefix or served.get("dht_prefix")
        if not arguments.peers:
            raise CommandError(
                f"the daemon is {status['state']} and has no address yet",
                hint=context.command("wait --ready"),
            )
    return generate.run(arguments)
