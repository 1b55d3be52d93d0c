"""Options of the commands that use a model of a swarm, and the model that they name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petalsd.config_addresses import check_maddr
from petalsd.imports import heavy_imports

if TYPE_CHECKING:
    from petalsd.client.model import RemoteCausalLM

PUBLIC = "public"
_LOG_LEVELS = ("debug", "info", "warning", "error")
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_model_arguments(parser: argparse.ArgumentParser, *, is_required: bool) -> None:
    """Which model, of which swarm. ``is_required``: model and peers may not be left out."""
    parser.add_argument("--model", required=is_required, metavar="SOURCE", help="Hub repository or directory")
    parser.add_argument(
        "--peers",
        required=is_required,
        nargs="+",
        action="extend",
        metavar="MADDR",
        help=f"addresses of members of the swarm, or the word {PUBLIC}",
    )
    parser.add_argument(
        "--dht-prefix", metavar="NAME", help="what the servers call the model, if not its name"
    )
    parser.add_argument(
        "--identity", type=Path, metavar="FILE", help="private key, made if missing; unset: a new PeerID"
    )
    parser.add_argument("--adapter", metavar="NAME", help="a LoRA adapter that the servers have")
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="auto",
        help="of the local parts of the model; default: %(default)s",
    )


def add_log_level(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--log-level",
        choices=_LOG_LEVELS,
        default=default,
        help="what goes to standard error; default: %(default)s",
    )


def check_peers(arguments: argparse.Namespace) -> None:
    """Ends the command, as wrong usage, where an address is none."""
    if arguments.peers == [PUBLIC]:
        return
    try:
        for peer in arguments.peers:
            check_maddr(peer, needs_peer=True)
    except ValueError as error:
        arguments.usage_error(f"--peers: {error}")


def check_model(arguments: argparse.Namespace) -> None:
    """Says what is wrong with a name; transformers would wonder."""
    with heavy_imports():
        from petalsd.models.source import ModelSource

    ModelSource(arguments.model).config()


def join_swarm(arguments: argparse.Namespace, **options: Any) -> RemoteCausalLM:
    """The model, to be closed by who asked for it; computes with the threads that the process may use.

    ``options`` are further ones of ``ClientOptions``.
    """
    with heavy_imports():
        import torch

        from petalsd.client.model import RemoteCausalLM
        from petalsd.client.options import ClientOptions
        from petalsd.ops.threads import fit_threads_to_quota
        from petalsd.swarm.protocol import PUBLIC_INITIAL_PEERS

    fit_threads_to_quota()
    return RemoteCausalLM.from_pretrained(
        arguments.model,
        initial_peers=PUBLIC_INITIAL_PEERS if arguments.peers == [PUBLIC] else arguments.peers,
        dht_prefix=arguments.dht_prefix,
        dtype=None if arguments.dtype == "auto" else getattr(torch, arguments.dtype),
        options=ClientOptions(identity_path=arguments.identity, adapter=arguments.adapter, **options),
    )
