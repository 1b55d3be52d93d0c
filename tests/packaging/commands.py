"""The verbs and options of both commands, asked of the parsers themselves."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from petalsd.cli import main as petalsd
from petalsd.cli.petalsctl import main as petalsctl
from petalsd.cli.petalsctl.options import add_common_options

PACKAGING = Path(__file__).resolve().parents[2] / "packaging"


def verbs() -> dict[str, list[str]]:
    """Command to its verbs."""
    return {
        "petalsd": [verb.name for verb in petalsd.VERBS],
        "petalsctl": [verb.name for verb in petalsctl.VERBS],
    }


def own_options() -> dict[tuple[str, str], set[str]]:
    """(command, verb) to the options that only this verb has."""
    found: dict[tuple[str, str], set[str]] = {}
    commands: list[tuple[str, Iterable[Any]]] = [("petalsd", petalsd.VERBS), ("petalsctl", petalsctl.VERBS)]
    for command, known in commands:
        for verb in known:
            parser = argparse.ArgumentParser(add_help=False)
            importlib.import_module(verb.module).add_arguments(parser)
            found[command, verb.name] = options_of(parser)
    return found


def all_options() -> dict[tuple[str, str], set[str]]:
    """(command, verb) to every option that may stand behind the verb; the verb "" is for those before it."""
    common = argparse.ArgumentParser()
    found = {("petalsd", ""): options_of(common) | {"--version"}}
    shared = {"petalsd": options_of(common)}
    add_common_options(common, is_verb=True)
    shared["petalsctl"] = options_of(common)
    found["petalsctl", ""] = shared["petalsctl"] | {"--version"}
    for (command, verb), options in own_options().items():
        found[command, verb] = options | shared[command]
    return found


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def choices_of(command: str, verb: str, option: str) -> set[str]:
    """What may follow an option."""
    modules = {"petalsd": petalsd.VERBS, "petalsctl": petalsctl.VERBS}
    module = next(known.module for known in modules[command] if known.name == verb)
    parser = argparse.ArgumentParser()
    importlib.import_module(module).add_arguments(parser)
    (action,) = (action for action in parser._actions if option in action.option_strings)
    return set(action.choices or ())
