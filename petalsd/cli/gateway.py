"""``petalsd gateway``: a model of a swarm behind OpenAI's HTTP interface, until SIGTERM or SIGINT (answers that
are being made are completed, exit 0; a second one cuts them off).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from petalsd.cli.exit_codes import EXIT_OK
from petalsd.cli.remote_model import add_log_level, add_model_arguments, check_model, check_peers, join_swarm
from petalsd.daemon.signals import Signals
from petalsd.gateway.keys import Keys
from petalsd.imports import heavy_imports
from petalsd.log import configure_logging
from petalsd.systemd import Notifier
from petalsd.types import HostPort

if TYPE_CHECKING:
    from petalsd.gateway.service import Gateway

log = structlog.get_logger(__name__)

_DEFAULT_ADDRESS = "127.0.0.1:8000"
_MAX_ANSWERS = 256
_DRAIN_S = 60.0
_RECOVERY_S = 60.0  # for a way through the swarm: who waits holds one of the answers that may be made
_LOOPBACK = ("127.", "::1", "localhost")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, is_required=True)
    parser.add_argument(
        "--listen",
        type=_address,
        default=_DEFAULT_ADDRESS,
        metavar="HOST:PORT",
        help="where requests are taken; default: %(default)s",
    )
    parser.add_argument(
        "--name",
        metavar="NAME",
        help="what the model is called there; unset: as --model, without directories",
    )
    parser.add_argument(
        "--api-keys",
        type=Path,
        metavar="FILE",
        help="keys of those who may ask, one on each line; unset: all may",
    )
    parser.add_argument(
        "--max-answers",
        type=_max_answers,
        default=16,
        metavar="N",
        help="answers that are made at the same time; default: %(default)s",
    )
    add_log_level(parser, "info")
    parser.set_defaults(usage_error=parser.error)


def run(arguments: argparse.Namespace) -> int:
    notifier = Notifier.take()
    check_peers(arguments)
    keys = Keys.read(arguments.api_keys) if arguments.api_keys else Keys()
    configure_logging("auto", arguments.log_level)
    with heavy_imports():  # late: bad usage is told without waiting for them
        from petalsd.client.tokenizer import load_tokenizer
        from petalsd.gateway.service import Gateway, GatewayOptions

    check_model(arguments)
    tokenizer = load_tokenizer(arguments.model)
    name = arguments.name or _name_of(arguments.model)
    if not keys.are_needed and not arguments.listen.host.startswith(_LOOPBACK):
        log.warning("open_to_everybody", listen=str(arguments.listen), hint="--api-keys FILE")
    with join_swarm(arguments, recovery_timeout_s=_RECOVERY_S) as model:
        options = GatewayOptions(name, arguments.listen, arguments.max_answers, keys)
        asyncio.run(_serve(Gateway(model, tokenizer, options), name, notifier))
    return EXIT_OK


async def _serve(gateway: Gateway, name: str, notifier: Notifier) -> None:
    with Signals() as signals:
        addresses = await gateway.start()
        notifier.ready()
        notifier.status(f"{name} at http://{addresses[0]}/v1")
        watchdog = asyncio.create_task(_feed_watchdog(notifier), name="watchdog")
        await signals.stop.wait()
        notifier.stopping()
        stopping = asyncio.create_task(gateway.stop(_DRAIN_S), name="stop")
        at_once = asyncio.create_task(signals.now.wait(), name="stop-at-once")
        await asyncio.wait({stopping, at_once}, return_when=asyncio.FIRST_COMPLETED)
        for task in (watchdog, at_once, stopping):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def _feed_watchdog(notifier: Notifier) -> None:
    """That the loop turns is what there is to prove: answers have deadlines of their own."""
    while True:
        notifier.watchdog()
        await asyncio.sleep(notifier.proof_interval_s / 2)


def _name_of(source: str) -> str:
    """``owner/model`` for a repository, the last part of a directory's path."""
    path = Path(source)
    return path.resolve().name if path.is_dir() else source


def _address(text: str) -> HostPort:
    try:
        return HostPort.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _max_answers(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MAX_ANSWERS:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of answers, 1 to {_MAX_ANSWERS}")
    return int(text)
