"""Tells a person what is going on: a spinner with seconds on a terminal, a line at start and end elsewhere."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console


class Progress:
    def __init__(self, stream: TextIO) -> None:
        """A terminal without Unicode shows question marks; it must not end the demo."""
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
        self.console = Console(file=stream, highlight=False)

    @contextmanager
    def task(self, title: str) -> Iterator[None]:
        """Show ``title`` while the body runs, and how long it took when it is done."""
        started_s = time.monotonic()
        if self.console.is_terminal:
            with self.console.status(f"{title} ..."):
                yield
        else:
            self.console.print(f"  {title} ...")
            yield
        self.console.print(f"  [green]✓[/green] {title} [dim]({time.monotonic() - started_s:.1f} s)[/dim]")
