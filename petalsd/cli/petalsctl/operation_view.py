"""Plans, progress and outcomes of operations, as a person reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from petalsd.cli.petalsctl.status_view import drain_text, span_text
from petalsd.cli.petalsctl.text import Line, Piece, advice, fields, line
from petalsd.cli.petalsctl.units import counted, duration, rate

_FEW = 3  # of a list that may be long


def plan_lines(plan: Mapping[str, Any], *, is_dry_run: bool) -> list[Line]:
    """Where to, who goes first, what the swarm gains, what it costs here, whose sessions it ends."""
    lines = [line(Piece(_verdict(plan, is_dry_run=is_dry_run), "bold"))]
    if plan["explanation"]:
        lines.append(advice(plan["explanation"]))
    pairs: list[tuple[str, Line | str]] = [("now", f"blocks {span_text(plan['current'])}")]
    if plan["weakest"]:
        pairs.append(("weakest", f"blocks {_some(map(span_text, plan['weakest']))}"))
    if plan["ahead"]:
        pairs.append(("first", _some(map(_turn, plan["ahead"]))))
    if plan["proposed"] is not None:
        pairs.append(("proposed", f"blocks {span_text(plan['proposed'])}"))
        pairs += [("gain", _gain(plan["gain"])), ("cost", _cost(plan["cost"])), ("sessions", _sessions(plan))]
    return [*lines, *fields(pairs)]


def progress_line(progress: Mapping[str, Any]) -> Line:
    """demo: draining, 3 sessions left, at most 42 s."""
    parts = [progress["state"]]
    if progress["stage"]:
        parts.append(f"{progress['stage']} {progress['item'] or ''}".rstrip())
    if progress["percent"] is not None:
        parts.append(f"{progress['percent']:.0f} %")
    if progress["operation"] == "drain":
        parts.append(drain_text(progress["sessions_left"], progress["deadline_left_s"]))
    return line(", ".join(parts))


def reload_lines(outcome: Mapping[str, Any], restart_command: str) -> list[Line]:
    """What is in force now, and what waits for a restart."""
    applied, waiting = outcome["applied"], outcome["needs_restart"]
    if not applied and not waiting:
        return [line("the configuration is as it was; a server looks at its placement again")]
    lines: list[Line] = []
    if applied:
        lines.append(line(Piece("applied", "good"), f"  {', '.join(applied)}"))
    if waiting:
        lines.append(line(Piece("needs a restart", "busy"), f"  {', '.join(waiting)}"))
        lines.append(advice(restart_command))
    return lines


def _verdict(plan: Mapping[str, Any], *, is_dry_run: bool) -> str:
    if not plan["would_move"]:
        return "it would stay where it is" if is_dry_run else "it stays where it is"
    target = span_text(plan["proposed"])
    return f"it would move to blocks {target}" if is_dry_run else f"it moves to blocks {target}"


def _gain(gain: Mapping[str, Any] | None) -> str:
    if gain is None:
        return "not known"
    before, after = gain["swarm_throughput_before"], gain["swarm_throughput_after"]
    ratio = gain["ratio"]
    times = "" if ratio is None else f" ({ratio:.2f}×)"
    won = f", {round(gain['tokens']):,} tokens won"
    return f"the swarm's weakest block from {rate(before)} to {rate(after)} tokens/s{times}{won}"


def _cost(cost: Mapping[str, Any] | None) -> str:
    if cost is None:
        return "not known"
    parts = [f"{counted(cost['blocks_to_load'], 'block')} to load", f"{cost['blocks_kept']} kept"]
    if cost["seconds_estimate"] is not None:
        parts.append(f"about {duration(cost['seconds_estimate'])}")
    parts.append(f"{round(cost['tokens']):,} tokens lost meanwhile")
    return ", ".join(parts)


def _turn(turn: Mapping[str, Any]) -> str:
    """…Qm1234 from 0:15 to 15:30."""
    return f"…{turn['peer_id'][-6:]} from {span_text(turn['current'])} to {span_text(turn['target'])}"


def _some(texts: Iterable[str]) -> str:
    """The first few, and how many more there are."""
    listed = list(texts)
    more = len(listed) - _FEW
    return ", ".join(listed[:_FEW]) + (f" and {more} more" if more > 0 else "")


def _sessions(plan: Mapping[str, Any]) -> str:
    return f"{plan['sessions_touched']} would end, {plan['sessions_kept']} go on"
