"""What every verb works with: the daemon that is meant, the two streams, and the form of the answer."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from petalsd.cli.petalsctl.connection import Connection
from petalsd.cli.petalsctl.instances import (
    Instance,
    System,
    explain,
    find_instance,
    ways_to_permission,
)
from petalsd.cli.petalsctl.problems import CommandError, NoAnswer, Refused
from petalsd.cli.petalsctl.terminal import Terminal
from petalsd.cli.petalsctl.text import Line

ANSWER_TIMEOUT_S = 10.0
SLOW_ANSWER_TIMEOUT_S = 90.0  # looks through the swarm first, or waits for parts of the daemon

Document = dict[str, Any]


class Context:
    """One call of the command. The daemon is looked for when it is first asked."""

    def __init__(self, arguments: argparse.Namespace, argv: Sequence[str]) -> None:
        self._arguments = arguments
        self._argv = argv
        self._instance: Instance | None = None
        self.environ: Mapping[str, str] = os.environ
        self.system = System()
        self.is_json: bool = arguments.json
        may_colour = not arguments.no_color
        self.out = Terminal(sys.stdout, may_colour=may_colour, environ=os.environ)
        self.err = Terminal(sys.stderr, may_colour=may_colour, environ=os.environ)

    @property
    def instance(self) -> Instance:
        if self._instance is None:
            named, socket = self._arguments.instance, self._arguments.socket
            self._instance = find_instance(named, socket, self.environ, self.system)
        return self._instance

    @property
    def is_named(self) -> bool:
        return self._arguments.instance is not None

    def get(self, target: str, timeout_s: float = ANSWER_TIMEOUT_S) -> bytes:
        """The daemon's answer; NoAnswer with the command to type next, or Refused."""
        with self._explained():
            return Connection(self.instance.socket).get(target, timeout_s)

    def post(self, target: str, body: Mapping[str, Any]) -> bytes:
        """As ``get``, for what changes something."""
        with self._explained():
            return Connection(self.instance.socket).post(target, body, SLOW_ANSWER_TIMEOUT_S)

    def follow(self, target: str, body: Mapping[str, Any]) -> Iterator[bytes]:
        """The lines of a streamed answer."""
        with self._explained():
            yield from Connection(self.instance.socket).follow(target, body, SLOW_ANSWER_TIMEOUT_S)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of the socket, and refusals for want of permission, with the way out."""
        instance = self.instance
        try:
            yield
        except OSError as error:
            raise explain(instance, error, self._argv) from error
        except Refused as refusal:
            if refusal.code == "overloaded":  # it was not read: a watch or a wait asks again
                raise NoAnswer(
                    f"the daemon takes no more now: {refusal.message}", hint=refusal.hint
                ) from refusal
            if refusal.code == "forbidden" and not refusal.hint:
                refusal.hint = ways_to_permission(refusal.acting_group, self._argv)
            raise

    def command(self, words: str) -> str:
        """What to type to reach the same daemon: ``petalsctl -i demo WORDS``."""
        named, socket = self._arguments.instance, self._arguments.socket
        which = f"-i {named} " if named is not None else ""
        if socket is not None:
            which = f"--socket {shlex.quote(str(socket))} "
        return f"petalsctl {which}{words}"

    def answer(self, body: bytes, view: Callable[[Document], list[Line]]) -> None:
        """The document as it came, or what a person reads."""
        if self.is_json:
            print_raw(body)
        else:
            self.out.show(understand(view, parse(body)))


def parse(body: bytes) -> Document:
    """A JSON object; CommandError for anything else."""
    try:
        document = json.loads(body)
    except ValueError as error:
        raise CommandError(f"the daemon's answer is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise CommandError("the daemon's answer is not a JSON object")
    return document


def understand(view: Callable[[Document], list[Line]], document: Document) -> list[Line]:
    """The lines of ``view``; CommandError when the document is not what this version knows."""
    try:
        return view(document)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        version = document.get("version", "another version")
        raise CommandError(
            f"the answer of petalsd {version} is not understood ({type(error).__name__}: {error})",
            hint="use the petalsctl of the same version, or --json",
        ) from error


def print_raw(body: bytes) -> None:
    """Bytes as they came, ended by a line end."""
    sys.stdout.flush()
    sys.stdout.buffer.write(body if body.endswith(b"\n") else body + b"\n")
    sys.stdout.buffer.flush()
