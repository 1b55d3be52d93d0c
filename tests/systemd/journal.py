"""The journal of a lab: entries as they come, and waits for them with deadlines."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry. ``monotonic_s`` is of the same clock as ``time.monotonic``.

    unit    that wrote it, or that systemd wrote about
    fields  by the journal's names, as text; petalsd's own begin with PETALSD_
    """

    unit: str
    message: str
    monotonic_s: float
    fields: Mapping[str, str]

    @property
    def event(self) -> str:
        """The name of petalsd's event; empty for other text."""
        return self.fields.get("PETALSD_EVENT", "")

    def __getitem__(self, name: str) -> str:
        """A field of petalsd's event, by the name that it was logged under."""
        return self.fields[f"PETALSD_{name.upper()}"]


def parse_entry(line: str) -> Entry:
    fields = {name: _text(value) for name, value in json.loads(line).items()}
    unit = fields.get("UNIT") or fields.get("_SYSTEMD_UNIT", "")
    return Entry(unit, fields.get("MESSAGE", ""), int(fields["__MONOTONIC_TIMESTAMP"]) / 1e6, fields)


def parse_entries(text: str) -> list[Entry]:
    return [parse_entry(line) for line in text.splitlines()]


def _text(value: object) -> str:
    """journalctl gives unprintable bytes as a list of numbers, and a repeated field as a list of texts."""
    if isinstance(value, list):
        return bytes(value).decode(errors="replace") if all(isinstance(v, int) for v in value) else str(value)
    return str(value)


class Journal:
    """What ``journalctl --follow`` has said up to now, read by a thread. ``mark`` then ``wait`` from there."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._entries: list[Entry] = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, name="journal", daemon=True)

    def mark(self) -> float:
        """Now, to wait for what comes after."""
        return time.monotonic()

    def wait(
        self, what: str, matches: Callable[[Entry], bool], since_s: float, timeout_s: float = WAIT_S
    ) -> Entry:
        """The first entry after ``since_s`` that matches; AssertionError with the end of the journal."""
        deadline_s = time.monotonic() + timeout_s
        seen = 0
        with self._changed:
            while True:
                for entry in self._entries[seen:]:
                    if entry.monotonic_s >= since_s and matches(entry):
                        return entry
                seen = len(self._entries)
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or not self._changed.wait(left_s):
                    raise AssertionError(f"no {what} within {timeout_s:g} s:\n{self.tail(since_s)}")

    def event(
        self, unit: str, name: str, since_s: float = 0.0, timeout_s: float = WAIT_S, **fields: str
    ) -> Entry:
        """The first event of petalsd of that name, with these fields."""

        def matches(entry: Entry) -> bool:
            wanted = {f"PETALSD_{key.upper()}": value for key, value in fields.items()}
            return entry.unit == unit and entry.event == name and wanted.items() <= entry.fields.items()

        return self.wait(f"{name} of {unit}", matches, since_s, timeout_s)

    def text(self, unit: str, part: str, since_s: float = 0.0, timeout_s: float = WAIT_S) -> Entry:
        """The first entry whose text holds ``part``."""
        return self.wait(
            f"{part!r} of {unit}",
            lambda entry: entry.unit == unit and part in entry.message,
            since_s,
            timeout_s,
        )

    def entries(self, unit: str, since_s: float = 0.0) -> list[Entry]:
        """What came up to now."""
        with self._changed:
            return [entry for entry in self._entries if entry.unit == unit and entry.monotonic_s >= since_s]

    def tail(self, since_s: float) -> str:
        with self._changed:
            recent = [entry for entry in self._entries if entry.monotonic_s >= since_s]
        return "\n".join(f"{entry.monotonic_s:.3f} {entry.unit}: {entry.message}" for entry in recent[-40:])

    def __enter__(self) -> Journal:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._thread.join(WAIT_S)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            entry = parse_entry(line)
            with self._changed:
                self._entries.append(entry)
                self._changed.notify_all()
