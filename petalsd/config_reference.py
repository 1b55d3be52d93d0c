"""Writes docs/configure.md's tables from the configuration itself, so that the page cannot be out of date."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from petalsd.config import Config

MARKER = "<!-- The rest is written by `make docs`. -->"


def key_tables() -> str:
    """One Markdown table per section: key, default, whether a reload applies it, meaning."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    for section, field in Config.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        yield from (f"## [{section}]", "", "| key | default | reload | meaning |", "|---|---|---|---|")
        for key, info in field.annotation.model_fields.items():
            yield f"| `{key}` | {_default(info)} | {_reload(info)} | {info.description} |"
        yield ""


def _default(info: FieldInfo) -> str:
    if info.default is PydanticUndefined:
        return "required"
    if info.default is None:
        return "unset"
    if isinstance(info.default, bool):
        return f"`{str(info.default).lower()}`"
    if isinstance(info.default, tuple):
        return "`[" + ", ".join(f'"{item}"' for item in info.default) + "]`"
    return f'`"{info.default}"`' if isinstance(info.default, str) else f"`{info.default}`"


def _reload(info: FieldInfo) -> str:
    extra = info.json_schema_extra
    return "yes" if isinstance(extra, dict) and extra.get("live") else "restart"


def main(page: Path) -> None:
    """Replace everything after the marker in ``page``."""
    head, marker, _ = page.read_text().partition(MARKER)
    page.write_text(f"{head}{marker}\n\n{key_tables()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
