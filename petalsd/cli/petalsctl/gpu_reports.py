"""What NVIDIA's tools print, taken apart: cards as ``nvidia-smi`` lists them, Xids as the kernel logs them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

QUERY = (
    "index", "name", "driver_version", "persistence_mode", "memory.total", "memory.used", "clocks.sm",
    "clocks.max.sm", "clocks_throttle_reasons.active", "temperature.gpu",
    "ecc.errors.uncorrected.volatile.total",
)  # fmt: skip
"""The columns of ``parse_cards``, for ``nvidia-smi --query-gpu=… --format=csv,noheader,nounits``."""

# nvml.h, nvmlClocksThrottleReason*; that a card is idle or was told to clock lower is nothing to look at.
_SLOWDOWNS = {
    0x04: "its power limit",
    0x08: "the hardware, for heat or power",
    0x20: "the driver, for heat",
    0x40: "the hardware, for heat",
    0x80: "an external power brake",
}
_XID = re.compile(r"NVRM: Xid \((?:PCI:)?(?P<bus>[\w:.]+)\): (?P<number>\d+)")
_TIME = re.compile(r"\[? *(?P<when>\d[\d.T:+-]+)")
_XID_MEANINGS = {
    13: "a kernel's exception", 31: "an access to an unmapped address", 43: "a channel's fault",
    45: "a channel ended, after another error", 48: "an uncorrectable memory error",
    62: "the card's controller halted", 63: "a memory page or row was retired", 64: "retiring memory failed",
    74: "an NVLink error", 79: "the card fell off its bus", 92: "many corrected memory errors",
    94: "a contained memory error", 95: "an uncontained memory error", 119: "the card's firmware did not answer",
    120: "an error in the card's firmware",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Card:
    """One GPU. What the card or the driver does not know is None; ``slowed_by`` is empty for full speed.

    total_bytes, used_bytes  of its memory
    clock_mhz, max_clock_mhz of its multiprocessors
    ecc_errors               uncorrectable, since the driver was loaded; None without ECC
    """

    index: int
    name: str
    driver: str
    is_persistent: bool | None
    total_bytes: int | None
    used_bytes: int | None
    clock_mhz: int | None
    max_clock_mhz: int | None
    slowed_by: tuple[str, ...]
    temperature_c: int | None
    ecc_errors: int | None


@dataclass(frozen=True, slots=True)
class Xid:
    """An error that the driver logged; ``when`` as the log has it."""

    number: int
    bus: str
    when: str

    @property
    def meaning(self) -> str:
        return _XID_MEANINGS.get(self.number, "see NVIDIA's list of Xids")


def parse_cards(output: str) -> list[Card]:
    """One for each line of ``nvidia-smi``; ValueError for a line of another form."""
    return [
        _card([column.strip() for column in row.split(",")]) for row in output.splitlines() if row.strip()
    ]


def parse_xids(lines: Iterable[str]) -> Iterator[Xid]:
    """Those among the kernel's lines, in their order; ``journalctl -o short-iso`` and ``dmesg`` are understood."""
    for text in lines:
        if found := _XID.search(text):
            time = _TIME.match(text)
            yield Xid(int(found["number"]), found["bus"], time["when"] if time else "")


def _card(columns: list[str]) -> Card:
    if len(columns) != len(QUERY):
        raise ValueError(f"nvidia-smi answered {len(columns)} columns, {len(QUERY)} were asked for")
    index, name, driver, persistence, total, used, clock, max_clock, reasons, temperature, errors = columns
    mask = int(reasons, 16) if reasons.startswith("0x") else 0
    return Card(
        index=int(index),
        name=name,
        driver=driver,
        is_persistent={"Enabled": True, "Disabled": False}.get(persistence),
        total_bytes=_mebibytes(total),
        used_bytes=_mebibytes(used),
        clock_mhz=_number(clock),
        max_clock_mhz=_number(max_clock),
        slowed_by=tuple(text for bit, text in _SLOWDOWNS.items() if mask & bit),
        temperature_c=_number(temperature),
        ecc_errors=_number(errors),
    )


def _number(text: str) -> int | None:
    """None for [N/A], [Unknown Error] and the like."""
    return int(text) if text.isdigit() else None


def _mebibytes(text: str) -> int | None:
    number = _number(text)
    return None if number is None else number << 20
