"""Sessions and peers as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from petalsd.cli.petalsctl.status_view import span_text, style_of_state
from petalsd.cli.petalsctl.text import (
    EMPTY,
    Column,
    Line,
    Piece,
    advice,
    clip,
    clip_middle,
    line,
    printable,
    table,
    width_of,
)
from petalsd.cli.petalsctl.units import count, counted, rate, short_duration

_SHORT_PEER = 12
_SHORT_SESSION = 10
_NAME_WIDTH = 20
_BUSY_IDLE_S = 60.0  # a client that thinks longer than this may be gone


def session_lines(document: Mapping[str, Any]) -> list[Line]:
    sessions = document["sessions"]
    if not sessions:
        return [line("no sessions")]
    columns = [
        Column("session"), Column("client"), Column("blocks"), Column("rows", is_right=True),
        Column("tokens", is_right=True), Column("of", is_right=True), Column("pages", is_right=True),
        Column("age", is_right=True), Column("idle", is_right=True),
    ]  # fmt: skip
    return table(columns, [_session_row(session) for session in sessions])


def peer_lines(document: Mapping[str, Any]) -> list[Line]:
    """Who serves which blocks, in the order of the blocks; then the blocks that nobody serves."""
    peers = sorted(document["peers"], key=_peer_order)
    columns = [
        Column("blocks"), Column("state"), Column("tokens/s", is_right=True), Column("decode", is_right=True),
        Column("ping", is_right=True), Column("peer"), Column("name", max_width=_NAME_WIDTH),
        Column("version", max_width=16),
    ]  # fmt: skip
    lines = table(columns, [_peer_row(peer) for peer in peers]) if peers else [line("no servers are known")]
    if uncovered := document["uncovered"]:
        missing = ", ".join(span_text(span) for span in uncovered)
        lines += [EMPTY, line(Piece(f"! nobody serves blocks {missing}", "bold bad"))]
        lines.append(advice("clients cannot use the model until somebody does"))
    elif peers:
        lines += [EMPTY, line(Piece(f"{counted(len(peers), 'server')}, every block is served", "dim"))]
    return lines


def _session_row(session: Mapping[str, Any]) -> list[Piece | str]:
    idle_s = session["idle_s"]
    return [
        clip_middle(session["id"], _SHORT_SESSION),
        _short_peer(session["peer"]),
        span_text(session["span"]),
        count(session["rows"]),
        count(session["position"]),
        count(session["max_tokens"]),
        count(session["kv_pages"]),
        short_duration(session["age_s"]),
        Piece(short_duration(idle_s), "busy" if idle_s > _BUSY_IDLE_S else ""),
    ]


def _peer_row(peer: Mapping[str, Any]) -> list[Piece | str]:
    is_ghost = peer.get("is_ghost", False)
    state = "ghost" if is_ghost else peer["state"]
    ping_ms, speed, decode = peer["ping_ms"], peer["throughput"], peer.get("inference_rps")
    name = peer["public_name"] or ""
    mark = "(this one)" if peer["is_self"] else "(relayed)" if peer["is_relayed"] else ""
    mark = f" {mark}" if name and mark else mark
    return [
        span_text(peer["span"]),
        Piece(state, "bad" if is_ghost else style_of_state(state)),
        "" if speed is None else rate(speed),
        "" if decode is None else rate(decode),
        "" if ping_ms is None else f"{ping_ms:.0f} ms" if ping_ms >= 10 else f"{ping_ms:.1f} ms",
        Piece(_short_peer(peer["peer_id"]), "bold" if peer["is_self"] else ""),
        clip(printable(name), _NAME_WIDTH - width_of(mark)) + mark,
        peer["version"] or "",
    ]


def _peer_order(peer: Mapping[str, Any]) -> tuple[int, int, str]:
    span = peer["span"]
    return (span["start"], span["end"], peer["peer_id"]) if span else (1 << 30, 0, peer["peer_id"])


def _short_peer(peer_id: str | None) -> str:
    """All PeerIDs begin alike: the end tells them apart."""
    return (
        "unknown"
        if not peer_id
        else peer_id
        if len(peer_id) <= _SHORT_PEER
        else f"…{peer_id[-_SHORT_PEER + 1 :]}"
    )
