"""The ``petalsd`` command: one module per verb, errors to exit codes. Heavy imports wait for the verb."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from petalsd import __version__
from petalsd.cli.exit_codes import EXIT_BROKEN_PIPE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, exit_code_of
from petalsd.cli.output import OutputFailed, open_closed_streams, say, watched_output
from petalsd.errors import PetalsdError


@dataclass(frozen=True, slots=True)
class _Verb:
    """``module`` has ``add_arguments(parser)`` and ``run(arguments) -> exit code``."""

    name: str
    module: str
    summary: str


VERBS = (
    _Verb("run", "petalsd.cli.run", "serve blocks of a model until stopped"),
    _Verb("check", "petalsd.cli.check", "validate everything that can be validated without serving"),
    _Verb("show", "petalsd.cli.show", "print the effective configuration and where each value came from"),
    _Verb("generate", "petalsd.cli.generate", "continue a prompt through a swarm"),
    _Verb("gateway", "petalsd.cli.gateway", "answer OpenAI's HTTP requests through a swarm"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    open_closed_streams()
    try:
        with watched_output():
            return _run(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:
        return EXIT_BROKEN_PIPE
    except OutputFailed as error:
        say(f"petalsd: {error}")
        return EXIT_FAILED
    except PetalsdError as error:
        return _fail(error)
    except KeyboardInterrupt:  # also while modules are imported, which takes seconds
        return EXIT_INTERRUPTED


def _run(words: list[str]) -> int:
    verb = next((verb for verb in VERBS if words and words[0] == verb.name), None)
    parser = _make_parser(verb)
    arguments = parser.parse_args(words)
    if verb is None:
        parser.print_help()
        return EXIT_OK
    return int(importlib.import_module(verb.module).run(arguments))


def _make_parser(chosen: _Verb | None) -> argparse.ArgumentParser:
    """All verbs by name and summary, but the arguments, and so the imports, of the chosen one only."""
    parser = argparse.ArgumentParser(
        prog="petalsd", description="Serves transformer blocks to a Petals-compatible swarm."
    )
    parser.add_argument("--version", action="version", version=f"petalsd {__version__}")
    verbs = parser.add_subparsers(metavar="VERB")
    for verb in VERBS:
        sub = verbs.add_parser(verb.name, help=verb.summary, description=verb.summary)
        if verb is chosen:
            importlib.import_module(verb.module).add_arguments(sub)
    return parser


def _fail(error: PetalsdError) -> int:
    say(f"petalsd: {error.message}", *([f"  {error.hint}"] if error.hint else []))
    return exit_code_of(error)


if __name__ == "__main__":
    sys.exit(main())
