"""The ``petalsctl`` command: one module per verb, loaded when it is asked for."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from petalsd import __version__
from petalsd.cli.output import OutputFailed, give_up_messages, open_closed_streams, say, watched_output
from petalsd.cli.petalsctl.context import Context, print_raw
from petalsd.cli.petalsctl.exit_codes import EXIT_BROKEN_PIPE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK
from petalsd.cli.petalsctl.options import Parser, add_common_options
from petalsd.cli.petalsctl.problems import CommandError, Refused
from petalsd.cli.petalsctl.text import Piece, advice, line
from petalsd.errors import PetalsdError

_PACKAGE = "petalsd.cli.petalsctl"
_EXIT_STATUSES = (
    "exit status: 0 done, or serving; 1 the daemon does not serve (now); 2 no answer from it; 3 wrong usage; "
    "4 it refused or failed"
)


@dataclass(frozen=True, slots=True)
class Verb:
    """``module`` has ``add_arguments(parser)`` and ``run(context, arguments) -> exit status``."""

    name: str
    module: str
    summary: str


VERBS = (
    Verb("status", f"{_PACKAGE}.status", "show what the daemon is doing; exit 0 if it serves"),
    Verb("sessions", f"{_PACKAGE}.sessions", "list the sessions of clients"),
    Verb("peers", f"{_PACKAGE}.peers", "list the servers of the swarm and the blocks that nobody serves"),
    Verb("drain", f"{_PACKAGE}.drain", "let running sessions finish and refuse new ones"),
    Verb("resume", f"{_PACKAGE}.resume", "serve again after a drain"),
    Verb("rebalance", f"{_PACKAGE}.rebalance", "choose blocks again, and move if that is better"),
    Verb("reload", f"{_PACKAGE}.reload", "read the configuration again"),
    Verb("wait", f"{_PACKAGE}.wait", "wait until the daemon serves, is drained or is gone"),
    Verb("metrics", f"{_PACKAGE}.metrics", "print the metrics in Prometheus' text format"),
    Verb("doctor", f"{_PACKAGE}.doctor", "look for what is wrong with this machine and its configuration"),
    Verb("generate", f"{_PACKAGE}.generate", "continue a prompt through the daemon's swarm"),
    Verb("version", f"{_PACKAGE}.version", "print the versions of this command and of the daemon"),
)
_TAKES_VALUE = ("-i", "--instance", "--socket")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    open_closed_streams()
    try:
        with watched_output():
            _tolerate_poor_encodings()
            return _run(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:
        return EXIT_BROKEN_PIPE
    except OutputFailed as error:
        say(f"petalsctl: {error}")
        return EXIT_FAILED
    except KeyboardInterrupt:  # also while modules are imported
        return EXIT_INTERRUPTED


def _run(words: list[str]) -> int:
    verb = _chosen(words)
    parser = make_parser([verb] if verb else [])
    arguments = parser.parse_args(words)
    if verb is None:
        parser.print_help()
        return EXIT_OK
    context = Context(arguments, words)
    try:
        return int(importlib.import_module(verb.module).run(context, arguments))
    except PetalsdError as error:
        return _fail(context, error)


def make_parser(loaded: Sequence[Verb]) -> argparse.ArgumentParser:
    """All verbs by name and summary, but the arguments, and so the imports, of the ``loaded`` ones only."""
    # An abbreviated --instance would hide the verb from _chosen, which has to know what takes a value.
    parser = Parser(
        prog="petalsctl",
        description="Asks and steers a running petalsd.",
        epilog=_EXIT_STATUSES,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"petalsctl {__version__}")
    add_common_options(parser, is_verb=False)
    verbs = parser.add_subparsers(metavar="VERB", title="verbs")
    for verb in VERBS:
        sub = verbs.add_parser(verb.name, help=verb.summary, description=verb.summary, allow_abbrev=False)
        if verb in loaded:
            importlib.import_module(verb.module).add_arguments(sub)
            add_common_options(sub, is_verb=True)
    return parser


def _chosen(words: Sequence[str]) -> Verb | None:
    """The verb among ``words``: the first one that is neither an option nor an option's value."""
    for index, word in enumerate(words):
        if word.startswith("-") or (index and words[index - 1] in _TAKES_VALUE):
            continue
        return next((verb for verb in VERBS if verb.name == word), None)
    return None


def _fail(context: Context, error: PetalsdError) -> int:
    """The sentence, and what to type next; for programs also a document of the daemon's form."""
    sentence = [line(Piece(part, "bad"), hang=2) for part in f"petalsctl: {error.message}".split("\n")]
    hint = [advice(error.hint)] if error.hint else []
    try:
        context.err.show([*sentence, *hint])
    except OSError:  # nobody can read it; the exit status stays
        give_up_messages()
    if context.is_json:
        document = {"error": {"code": error.code, "message": error.message, "hint": error.hint}}
        body = error.body if isinstance(error, Refused) else b""
        print_raw(body or json.dumps(document).encode())
    return error.exit_code if isinstance(error, CommandError) else EXIT_FAILED


def _tolerate_poor_encodings() -> None:
    """A terminal without Unicode shows question marks; it must not end the command."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


if __name__ == "__main__":
    sys.exit(main())
