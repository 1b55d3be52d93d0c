"""Writes what describes the keys from the configuration itself, so that none of it can be out of date.

The tables of docs/configure.md, the keys of petalsd.toml(5), and the commented example configuration.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from petalsd.config import Config

# What the example shows for keys without a default; the model is public and small.
_EXAMPLES = {
    "model.source": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "model.revision": "main",
    "model.dht_prefix": "SmolLM2-135M-Instruct-hf",
    "model.token_file": "credential:hub-token",
    "model.cache_dir": "/srv/petalsd/weights",
    "model.max_disk_bytes": "50GB",
    "blocks.span": "0:15",
    "swarm.identity_path": "/var/lib/petalsd/NAME/identity.key",
    "swarm.public_name": "example",
    "control.socket": "/run/petalsd/NAME/control.sock",
    "control.group": "petalsd",
    "metrics.listen": "127.0.0.1:9464",
}


class _Key(NamedTuple):
    section: str
    name: str
    field: FieldInfo

    @property
    def is_required(self) -> bool:
        return self.field.default is PydanticUndefined

    @property
    def is_live(self) -> bool:
        extra = self.field.json_schema_extra
        return isinstance(extra, dict) and bool(extra.get("live"))

    @property
    def default(self) -> str:
        """As it would stand in the file."""
        if self.is_required:
            return "required"
        return "unset" if self.field.default is None else _toml(self.field.default)


def key_tables() -> str:
    """One Markdown table per section: key, default, whether a reload applies it, meaning."""
    return "\n".join(_markdown_lines())


def manual_keys() -> str:
    """The sections and keys in mdoc(7)."""
    return "\n".join(_mdoc_lines())


def example() -> str:
    """Every key with its meaning, commented out at its default or at an example; only the source is set."""
    return "\n".join(_example_lines())


def _sections() -> Iterator[tuple[str, list[_Key]]]:
    for section, field in Config.model_fields.items():
        fields = cast(type[BaseModel], field.annotation).model_fields
        yield section, [_Key(section, name, info) for name, info in fields.items()]


def _markdown_lines() -> Iterator[str]:
    yield ""
    for section, keys in _sections():
        yield from (f"## [{section}]", "", "| key | default | reload | meaning |", "|---|---|---|---|")
        for key in keys:
            default = key.default if key.default in ("required", "unset") else f"`{key.default}`"
            reload = "yes" if key.is_live else "restart"
            yield f"| `{key.name}` | {default} | {reload} | {key.field.description} |"
        yield ""


def _mdoc_lines() -> Iterator[str]:
    for section, keys in _sections():
        yield from (f".Ss Section \\&[{section}]", ".Bl -tag -width Ds")
        for key in keys:
            yield f".It Cm {key.name}"
            yield _roff(f"{key.field.description}.")
            yield from ("Default:", _roff(f"{key.default}."))
            if key.is_live:
                yield "A reload applies it."
        yield ".El"
    yield ""


def _example_lines() -> Iterator[str]:
    yield ""
    for section, keys in _sections():
        yield f"[{section}]"
        for key in keys:
            yield f"# {key.field.description}" + (" (a reload applies it)" if key.is_live else "")
            value = key.field.default
            if value is None or key.is_required:
                value = _EXAMPLES[f"{section}.{key.name}"]
            yield f"{'' if key.is_required else '#'}{key.name} = {_toml(value)}"
        yield ""


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _roff(text: str) -> str:
    """A text line of roff(7): its escapes and control characters are meant as characters."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace('"', "\\(dq").replace("~", "\\(ti")
    return f"\\&{text}" if text.startswith((".", "'")) else text


class Form(NamedTuple):
    """``marker``: the line of a page after which everything is ``written``."""

    marker: str
    written: Callable[[], str]


# By the suffix of the page.
FORMS = {
    ".md": Form("<!-- The rest is written by `make docs`. -->", key_tables),
    ".5": Form('.\\" The rest is written by `make docs`.', manual_keys),
    ".toml": Form("# The rest is written by `make docs`.", example),
}


def main(pages: Sequence[str]) -> None:
    """Replace everything after the marker in each of the ``pages``."""
    for page in map(Path, pages):
        form = FORMS[page.suffix]
        head, _, _ = page.read_text().partition(form.marker)
        page.write_text(f"{head}{form.marker}\n{form.written()}")


if __name__ == "__main__":
    main(sys.argv[1:])
