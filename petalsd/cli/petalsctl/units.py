"""Numbers as people read them."""

from __future__ import annotations

import math

_SIZE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def duration(seconds: float) -> str:
    """0.4 s, 12 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    if not math.isfinite(seconds):
        return "for ever"
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    for big, small, big_s, small_s in (("min", "s", 60, 1), ("h", "min", 3600, 60), ("d", "h", 86400, 3600)):
        if whole < big_s * (60 if big != "h" else 24) or big == "d":
            rest = whole % big_s // small_s
            return f"{whole // big_s} {big} {rest} {small}" if rest else f"{whole // big_s} {big}"
    raise AssertionError("days have no limit")


def short_duration(seconds: float) -> str:
    """One unit, for tables: 0.4 s, 93 s, 12 min, 5 h, 3 d."""
    if seconds < 120:
        return duration(seconds) if seconds < 59.5 else f"{seconds:.0f} s"
    for unit, unit_s, limit in (("min", 60, 120), ("h", 3600, 48)):
        if seconds < unit_s * limit:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def size(num_bytes: float) -> str:
    """512 B, 1.5 GiB."""
    unit = 0
    while abs(num_bytes) >= 1024 and unit < len(_SIZE_UNITS) - 1:
        num_bytes /= 1024
        unit += 1
    return f"{num_bytes:.0f} B" if unit == 0 else f"{num_bytes:.1f} {_SIZE_UNITS[unit]}"


def count(number: float) -> str:
    """12,345."""
    return f"{number:,.0f}"


def rate(per_second: float) -> str:
    """Three figures are enough: 0.83, 12.4, 1,234."""
    if per_second < 9.995:
        return f"{per_second:.2f}"
    return f"{per_second:.1f}" if per_second < 99.95 else count(per_second)


def counted(number: int, noun: str) -> str:
    """1 session, 12 sessions."""
    return f"{count(number)} {noun}" if number == 1 else f"{count(number)} {noun}s"
