"""Writes the tables of docs/metrics.md from the catalogue itself, so that none of it can be out of date."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from petalsd.metrics import CATALOGUE, PREFIX, Family

MARKER = "<!-- The rest is written by `make docs`. -->"


def metric_tables() -> str:
    """One Markdown table per section: name, type, labels, meaning."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    for section, families in CATALOGUE.items():
        yield from (f"## {section}", "", "| metric | type | labels | meaning |", "|---|---|---|---|")
        yield from (_row(family) for family in families)
        yield ""


def _row(family: Family) -> str:
    labels = ", ".join(f"`{label}`" for label in family.labels)
    return f"| `{PREFIX}{family.name}` | {family.kind} | {labels} | {family.help} |"


def main(page: Path) -> None:
    """Replace everything after the marker."""
    head, _, _ = page.read_text().partition(MARKER)
    page.write_text(f"{head}{MARKER}\n\n{metric_tables()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
