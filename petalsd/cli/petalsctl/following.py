"""A long operation of the daemon, followed on one line that is redrawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from petalsd.cli.petalsctl.context import Context, Document, parse, print_raw, understand
from petalsd.cli.petalsctl.operation_view import progress_line
from petalsd.cli.petalsctl.problems import CommandError, NoAnswer
from petalsd.cli.petalsctl.text import Line, advice, line


class Followed:
    """Shows the progress of one operation. ``last`` is the newest document, kept for a farewell."""

    def __init__(self, context: Context, target: str, body: Mapping[str, Any]) -> None:
        self._context = context
        self._target = target
        self._body = body
        self._shown: object = None
        self.last: Document | None = None

    def run(self) -> Document:
        """Follow to the end; the last document. CommandError when the operation failed.

        KeyboardInterrupt passes through; the operation goes on without us.
        """
        with self._context.out.hidden_cursor():
            for raw in self._context.follow(self._target, self._body):
                progress = parse(raw)
                self.last = progress
                self._show(raw, progress)
                if progress.get("done"):
                    return self._finish(progress)
        raise NoAnswer(
            "the daemon ended the connection before the operation was done",
            hint=self._context.command("status"),
        )

    def leave(self, farewell: list[Line]) -> None:
        """After an interruption: say what goes on."""
        if self._context.out.is_terminal and not self._context.is_json:
            self._context.out.leave()
        self._context.err.show(farewell)

    def _show(self, raw: bytes, progress: Document) -> None:
        """Each document as JSON; redrawn on a terminal; elsewhere a line whenever more than the time changes."""
        out = self._context.out
        if self._context.is_json:
            print_raw(raw)
            return
        shown = understand(lambda document: [progress_line(document)], progress)
        if out.is_terminal:
            out.draw(shown)
            return
        change = {
            key: value for key, value in progress.items() if not key.endswith("_s") and key != "percent"
        }
        if change != self._shown:
            out.show(shown)
        self._shown = change

    def _finish(self, progress: Document) -> Document:
        out = self._context.out
        if out.is_terminal and not self._context.is_json:
            out.erase()
        if error := progress.get("error"):
            raise CommandError(str(error.get("message", "it failed")), hint=str(error.get("hint") or ""))
        return progress


def goes_on(what: str, *commands: str) -> list[Line]:
    """The operation is the daemon's: our end is not its end."""
    return [line(what), *(advice(command) for command in commands)]
