"""``petalsd show``: effective values and where each came from. Never imports torch."""

from __future__ import annotations

import argparse
import codecs
import json
import re
import sys
from pathlib import Path

from petalsd.cli.options import add_config_arguments, config_choice
from petalsd.config_loading import LoadedConfig, obeyed_keys, value_of
from petalsd.types import BlockSpan, HostPort


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object: key to value and origin")


def run(arguments: argparse.Namespace) -> int:
    loaded = config_choice(arguments).load()
    print(json.dumps(_as_json(loaded), indent=2) if arguments.json else _as_toml(loaded))
    return 0


def _as_json(loaded: LoadedConfig) -> dict[str, dict[str, object]]:
    return {
        key: {"value": _plain(value_of(loaded.config, key)), "origin": loaded.origins[key]}
        for key in obeyed_keys(loaded.config)
    }


def _as_toml(loaded: LoadedConfig) -> str:
    """A valid file with the same effect; the origin of each value is its comment."""
    rows: list[tuple[str, str]] = []
    section = ""
    for key in obeyed_keys(loaded.config):
        at, _, name = key.partition(".")
        if at != section:
            section = at
            rows += [("", ""), (f"[{section}]", "")]
        value = value_of(loaded.config, key)
        text = f"# {name} is not set" if value is None else f"{name} = {_toml(_plain(value))}"
        rows.append((text, loaded.origins[key]))
    width = min(max(len(text) for text, _ in rows), 60)
    lines = [f"{text:<{width}}  # {origin}" if origin else text for text, origin in rows]
    return "\n".join(lines).strip()


def _plain(value: object) -> object:
    if isinstance(value, BlockSpan | HostPort | Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _toml(value: object) -> str:
    """JSON's text, numbers, lists and booleans are TOML's, whose files are UTF-8 whatever a terminal speaks."""
    text = json.dumps(value, ensure_ascii=False)
    is_utf8 = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
    return re.sub("\x7f" if is_utf8 else "[^\x20-\x7e]", _escaped, text)


def _escaped(character: re.Match[str]) -> str:
    return f"\\U{ord(character[0]):08x}"
