"""The status document as a person reads it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from petalsd.cli.petalsctl.text import EMPTY, Line, Piece, advice, bar, clip_middle, fields, line
from petalsd.cli.petalsctl.units import count, counted, duration, rate, size

_BAR_WIDTH = 20
_STATE_STYLES = {"online": "good", "failed": "bad", "stopped": "dim", "drained": "busy"}
_SEVERITY_STYLES = {"critical": "bold bad", "warning": "bold busy", "info": "bold"}
_PATHS = {
    "fused": "fused blocks",
    "packed": "packed layers",
    "plain": "plain layers",
}
_RATE_SOURCES = {
    "sample": ", measured on a random one",
    "served": ", measured on those served",
    "live": ", as clients' requests show",
}
_SEVERITY_MARKS = {"critical": "✗", "warning": "!", "info": "i"}

_Document = Mapping[str, Any]


def status_lines(document: _Document) -> list[Line]:
    """State first, then what is served, how it goes, and what is wrong with the way out."""
    pairs = [
        *_state_fields(document),
        *_serving_fields(document),
        *_load_fields(document),
        *_upkeep_fields(document),
        *_network_fields(document),
    ]
    return [headline(document), *fields(pairs), *warning_lines(document["warnings"])]


def short_status(document: _Document) -> Line:
    """One line, for redrawing while something is waited for."""
    state = document["state"]
    parts: list[Piece | str] = [Piece(f"{document['instance']} is {state}", style_of_state(state))]
    if loading := document.get("loading"):
        parts.append(": " + _loading_text(loading))
    elif drain := document.get("drain"):
        parts.append(": " + drain_text(drain["sessions_left"], drain["deadline_left_s"]))
    elif document["reason"] and state != "online":
        parts.append(f": {document['reason']}")
    return line(*parts)


def style_of_state(state: str) -> str:
    return _STATE_STYLES.get(state, "busy")


def drain_text(sessions_left: int, deadline_left_s: float | None) -> str:
    """3 sessions left, at most 42 s."""
    left = f"{counted(sessions_left, 'session')} left"
    return left if deadline_left_s is None else f"{left}, at most {duration(deadline_left_s)}"


def span_text(span: Mapping[str, int] | None) -> str:
    return "none" if span is None else f"{span['start']}:{span['end']}"


def headline(document: _Document) -> Line:
    state, style = document["state"], style_of_state(document["state"])
    about = f"  petalsd {document['version']}, pid {document['pid']}, up {duration(document['uptime_s'])}"
    return line(
        Piece("● ", style),
        Piece(document["instance"], "bold"),
        " is ",
        Piece(state, f"bold {style}" if style != "dim" else style),
        f" for {duration(document['since_s'])}",
        Piece(about, "dim"),
    )


def _state_fields(document: _Document) -> Iterable[tuple[str, Line | str]]:
    if document["reason"]:
        yield "because", document["reason"]
    if loading := document["loading"]:
        share = (loading["percent"] or 0.0) / 100
        if amounts := ", ".join(_loading_amounts(loading)):
            yield "loading", line(*bar(share, _BAR_WIDTH, "busy"), f" {amounts}")
        yield "" if amounts else "loading", _loading_what(loading)
    if drain := document["drain"]:
        text = drain_text(drain["sessions_left"], drain["deadline_left_s"])
        yield "drain", text + (f", {drain['abandoned']} ended at the deadline" if drain["abandoned"] else "")


def _loading_text(loading: Mapping[str, Any]) -> str:
    """fetching model-00002.safetensors, 45 %, 1.2 GiB of 2.7 GiB."""
    return ", ".join([_loading_what(loading), *_loading_amounts(loading)])


def _loading_what(loading: Mapping[str, Any]) -> str:
    return f"{loading['stage']} {loading['item'] or ''}".strip()


def _loading_amounts(loading: Mapping[str, Any]) -> list[str]:
    parts: list[str] = []
    if loading["percent"] is not None:
        parts.append(f"{loading['percent']:.0f} %")
    if loading["total"]:
        amount = size if loading["unit"] == "bytes" else count
        unit = "" if loading["unit"] == "bytes" else f" {loading['unit'] or ''}"
        parts.append(f"{amount(loading['done'] or 0)} of {amount(loading['total'])}{unit}".rstrip())
    return parts


def _serving_fields(document: _Document) -> Iterable[tuple[str, Line | str]]:
    model = document["model"]
    what = ["" if model["quantization"] in (None, "none") else model["quantization"], model["dtype"]]
    yield (
        "model",
        line(
            model["source"],
            Piece(f"  {model['family']}, {' '.join(filter(None, what))} on {model['device']}", "dim"),
        ),
    )
    yield from _path_fields(model)
    if adapters := model.get("adapters"):
        yield "adapters", ", ".join(adapters)
    if graphs := document.get("graphs"):
        yield "graphs", _graphs_line(graphs)
    if model["dht_prefix"] not in (None, model["source"]):
        yield "in the swarm", f"{model['dht_prefix']}"
    total = model["num_blocks"]
    if span := document["span"]:
        place = f" {span_text(span)} of {total}"
        yield "blocks", line(*_span_bar(span, total), place, *_online_part(span, document.get("served_span")))
    else:
        yield "blocks", f"none yet of {total}"


def _online_part(span: Mapping[str, int], served: Mapping[str, int] | None) -> tuple[Piece, ...]:
    """Which blocks serve while others of the span are still to come."""
    if served is None or served == span:
        return ()
    num_served, num_blocks = (each["end"] - each["start"] for each in (served, span))
    return (Piece(f"  {span_text(served)} online, {num_served} of {num_blocks}", "busy"),)


def _path_fields(model: Mapping[str, Any]) -> Iterable[tuple[str, Line | str]]:
    """How blocks are computed, a line for each kind of them, and what was tried before and found wrong."""
    name = "computed by"
    for kind in model.get("block_kinds", []):
        *rejected, taken = kind["trials"]
        details = f"  {taken['kernels']}, error {_error_text(taken)}"
        of_kind = "" if len(model["block_kinds"]) == 1 else f", {kind['kind']}"
        yield name, line(_PATHS[taken["path"]], Piece(details + of_kind, "dim"))
        for trial in rejected:
            what = f"not {_PATHS[trial['path']]}: error {_error_text(trial)}"
            yield "", line(Piece(what, "bad"), Piece(f"  {trial['kernels']}", "dim"))
        name = ""


def _graphs_line(graphs: Mapping[str, Any]) -> Line:
    """How many of the captured graphs there are to be there are."""
    captured, wanted = graphs["captured"], graphs["wanted"]
    memory = Piece(f"  {size(graphs['memory_bytes'])}", "dim")
    if graphs["failure"] is not None:
        return line(Piece(f"{count(captured)} of {count(wanted)} captured, the rest failed", "bad"), memory)
    if captured < wanted:
        return line(Piece(f"{count(captured)} of {count(wanted)} captured", "busy"), memory)
    return line(f"{count(captured)} captured", memory)


def _error_text(trial: Mapping[str, Any]) -> str:
    error = "not finite" if trial["error"] is None else f"{trial['error']:.1e}"
    return f"{error}, {trial['tolerance']:.1e} tolerated"


def _span_bar(span: Mapping[str, int], total: int) -> tuple[Piece, ...]:
    """Where in the model the span lies."""
    start = round(span["start"] / total * _BAR_WIDTH)
    end = max(round(span["end"] / total * _BAR_WIDTH), start + 1)
    served = Piece("█" * (end - start), "accent")
    return Piece("░" * start, "dim"), served, Piece("░" * (_BAR_WIDTH - end), "dim")


def _load_fields(document: _Document) -> Iterable[tuple[str, Line | str]]:
    sessions = document["sessions"]
    text = f"{count(sessions['active'])} of {count(sessions['limit'])}"
    if sessions["rows"] != sessions["active"]:
        text += f", {counted(sessions['rows'], 'sequence')}"
    if sessions["waiting"]:
        text += f", {count(sessions['waiting'])} waiting for room"
    yield "sessions", text
    if kv := document["kv"]:
        used = 1 - kv["pages_free"] / kv["pages_total"] if kv["pages_total"] else 1.0
        style = "good" if used < 0.8 else "busy" if used < 0.95 else "bad"
        text = f" {used * 100:.0f} %, room for {count(_tokens_left(kv, document['span']))} tokens"
        pages = Piece(f"  {counted(kv['pages_total'], 'page')}", "dim")
        yield "cache", line(*bar(used, _BAR_WIDTH, style), text, pages)
        if spill := kv["spill"]:
            taken = f"{size(spill['file_bytes'])} of {size(spill['max_bytes'])} taken"
            yield (
                "on disk",
                line(
                    f"{counted(spill['pages_spilled'], 'page')} of idle sessions", Piece(f"  {taken}", "dim")
                ),
            )
        if kept := kv["prefixes"]:
            reused = f"{count(kept['tokens_reused'])} of {counted(kept['tokens_seen'], 'token')} reused"
            taken = f"{size(kept['bytes'])} of {size(kept['max_bytes'])} taken"
            yield "prompts", line(reused, Piece(f"  {taken}", "dim"))
    if speed := document["throughput"]:
        yield from _speed_fields(speed)


def _tokens_left(kv: Mapping[str, Any], span: Mapping[str, int] | None) -> int:
    """Of a session that uses all our blocks; the document sums over them, since a session may use fewer."""
    num_blocks = 1 if span is None else span["end"] - span["start"]
    return int(kv["tokens_left"]) // num_blocks


def _speed_fields(speed: Mapping[str, Any]) -> Iterable[tuple[str, Line | str]]:
    """The figure that the swarm compares servers by, what it was made of, and where that comes from."""
    total = f"{rate(speed['tokens_per_s'])} tokens/s"
    if speed["inference_rps"] is None or speed["forward_rps"] is None:
        yield "announced", line(total, Piece("  configured", "dim"))
        return
    network = "" if speed["network_rps"] is None else f"  network {rate(speed['network_rps'])}"
    if network and speed.get("network_source"):
        network += f", {speed['network_source']}"
    yield "announced", line(total, Piece(network, "dim"))
    blocks = f"decode {rate(speed['inference_rps'])}, passes {rate(speed['forward_rps'])} per block"
    yield "", line(Piece(blocks + _RATE_SOURCES.get(speed.get("source", ""), ""), "dim"))


def _upkeep_fields(document: _Document) -> Iterable[tuple[str, Line | str]]:
    balance = document["balance"]
    if balance["is_pinned"]:
        text = _why_never(document["span"], document["model"]["num_blocks"])
    elif not balance["quality"]:
        text = "never by itself, quality 0"
    elif balance["next_check_s"] is not None:
        text = f"next check in {duration(balance['next_check_s'])}, quality {balance['quality']:g}"
    else:
        text = f"quality {balance['quality']:g}"
    yield "balance", text
    if move := balance["last_move"]:
        ago = duration(time.time() - move["at_unix_s"])
        yield (
            "last move",
            f"{_move_text(move)}, {ago} ago" + (f": {move['reason']}" if move["reason"] else ""),
        )
    yield from watchdog_fields(document["watchdog"])


def watchdog_fields(watchdog: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Nothing where nobody watches."""
    if watchdog["interval_s"] is not None:
        since = watchdog["last_ping_s"]
        ping = "no ping yet" if since is None else f"ping {duration(since)} ago"
        yield "watchdog", f"{ping}, limit {duration(watchdog['interval_s'])}{_step_text(watchdog)}"


def _why_never(span: Mapping[str, int] | None, num_blocks: int) -> str:
    """The configuration names the blocks, or there are no others to go to."""
    if span is None:
        return "never"
    is_whole = span["end"] - span["start"] == num_blocks
    return "never, these are all blocks of the model" if is_whole else "never, the blocks are pinned"


def _move_text(move: Mapping[str, Any]) -> str:
    return f"{span_text(move['from'])} → {span_text(move['to'])}"


def _step_text(watchdog: Mapping[str, Any]) -> str:
    since = watchdog.get("engine_last_step_s")
    return "" if since is None else f"; the engine's last step {duration(since)} ago"


def _network_fields(document: _Document) -> Iterable[tuple[str, Line | str]]:
    if document["peer_id"]:
        yield "peer", document["peer_id"]
    if document["is_relayed"]:
        yield "reached", line(Piece("through relays only", "busy"))
    for name, maddr in zip(["listens on"] + [""] * len(document["maddrs"]), document["maddrs"], strict=False):
        yield name, _short_maddr(maddr, document["peer_id"])


def _short_maddr(maddr: str, peer_id: str | None) -> str:
    """Without our own PeerID, which stands above; whole with --json, for pasting."""
    return clip_middle(maddr.removesuffix(f"/p2p/{peer_id}"), 60)


def warning_lines(warnings: list[Mapping[str, Any]]) -> list[Line]:
    lines: list[Line] = []
    for warning in warnings:
        style = _SEVERITY_STYLES.get(warning["severity"], "bold busy")
        mark = _SEVERITY_MARKS.get(warning["severity"], "!")
        since = f"  {warning['code']}, {duration(warning['since_s'])}"
        lines += [EMPTY, line(Piece(f"{mark} {warning['title']}", style), Piece(since, "dim"))]
        if warning["hint"]:
            lines.append(advice(warning["hint"]))
    return lines
