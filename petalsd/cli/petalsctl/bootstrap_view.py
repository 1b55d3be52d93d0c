"""A bootstrap node's documents as a person reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from petalsd.cli.petalsctl.list_views import peer_lines
from petalsd.cli.petalsctl.status_view import headline, warning_lines, watchdog_fields
from petalsd.cli.petalsctl.text import EMPTY, Line, Piece, fields, line
from petalsd.cli.petalsctl.units import count, counted

_Document = Mapping[str, Any]
_LOOPBACK = re.compile(r"/ip4/127\.|/ip6/::1/")


def is_bootstrap(document: _Document) -> bool:
    """Whether the daemon that answered is a bootstrap node; a server otherwise."""
    return document.get("role") == "bootstrap"


def bootstrap_lines(document: _Document) -> list[Line]:
    """State first, then the addresses that others need, what it knows, and what is wrong with the way out."""
    return [headline(document), *fields(_fields(document)), *warning_lines(document["warnings"])]


def swarm_lines(document: _Document) -> list[Line]:
    """Each model of the swarm, and who serves it."""
    models = document["models"]
    if not models:
        return [line("no server has announced a model")]
    lines: list[Line] = []
    for model in models:
        about = [counted(model["num_blocks"], "block")]
        if model["repository"] not in (None, model["dht_prefix"]):
            about.insert(0, model["repository"])
        lines += [EMPTY] if lines else []
        lines += [line(Piece(model["dht_prefix"], "bold"), Piece(f"  {', '.join(about)}", "dim")), EMPTY]
        lines += peer_lines(model)
    return lines


def _fields(document: _Document) -> Iterable[tuple[str, Line | str]]:
    if document["reason"]:
        yield "because", document["reason"]
    yield "role", line("bootstrap", Piece("  others join through it, and reach those behind a NAT", "dim"))
    yield (
        "knows",
        line(counted(document["known_peers"], "peer"), ", ", _initial_piece(document["initial_peers"])),
    )
    yield "keeps", f"{counted(document['stored_keys'], 'key')} of the directory"
    yield from watchdog_fields(document["watchdog"])
    yield "reached", _reached_line(document["is_reachable"])
    # Whole, for pasting: they are what others need.
    maddrs = [maddr for maddr in document["maddrs"] if not _LOOPBACK.match(maddr)] or document["maddrs"]
    yield from zip(["address"] + [""] * len(maddrs), maddrs, strict=False)


def _initial_piece(initial: _Document) -> Piece:
    if not initial["total"]:
        return Piece("no other bootstrap node is configured")
    text = f"{count(initial['known'])} of {counted(initial['total'], 'other bootstrap node')}"
    return Piece(text, "" if initial["known"] == initial["total"] else "busy")


def _reached_line(is_reachable: bool | None) -> Line:
    if is_reachable is None:
        return line("not known, nobody could be asked")
    return line("by others directly") if is_reachable else line(Piece("not by others", "bold bad"))
