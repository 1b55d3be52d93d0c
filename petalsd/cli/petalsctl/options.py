"""Options that every verb takes, and the types of their values."""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path
from typing import NoReturn

from petalsd.cli.petalsctl.exit_codes import EXIT_USAGE

_MAX_S = 1e9  # a longer sleep is beyond the clock
_SPAN = re.compile(r"(\d+):(\d+)")


class Parser(argparse.ArgumentParser):
    """Bad usage exits 3: 2 says that the daemon does not answer."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(EXIT_USAGE, f"{self.prog}: {message}\n")


def add_common_options(parser: argparse.ArgumentParser, *, is_verb: bool) -> None:
    """They may stand before the verb and behind it; where a verb leaves one out, what stood before counts."""

    def default(value: object) -> object:
        return argparse.SUPPRESS if is_verb else value

    group = parser.add_argument_group("which daemon, and how it is shown")
    group.add_argument(
        "-i",
        "--instance",
        metavar="NAME",
        default=default(None),
        help="the instance, as in petalsd@NAME; may be left out where only one runs",
    )
    group.add_argument(
        "--socket", metavar="PATH", type=Path, default=default(None), help="the daemon's control socket"
    )
    group.add_argument(
        "--json", action="store_true", default=default(False), help="print the document as the daemon sent it"
    )
    group.add_argument(
        "--no-color", action="store_true", default=default(False), help="as the environment's NO_COLOR"
    )


def seconds(text: str) -> float:
    """A number of seconds, not negative, and no more than thirty years."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= _MAX_S:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, 0 to {_MAX_S:,.0f}")
    return number


def span(text: str) -> str:
    """``A:B``, as the daemon reads it."""
    match = _SPAN.fullmatch(text.strip())
    if match is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no span of blocks: start:end, for instance 0:16")
    return f"{match[1]}:{match[2]}"
