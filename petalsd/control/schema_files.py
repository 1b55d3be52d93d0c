"""Writes the JSON schemas of the control socket's documents, for programs that are not in Python.

python -m petalsd.control.schema_files DIRECTORY
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from petalsd.status_schemas import DOCUMENTS, schema_of

DIRECTORY = Path(__file__).parent / "schemas"


def schema_text(name: str) -> str:
    return json.dumps(schema_of(name), indent=2) + "\n"


def write_all(directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    for name in DOCUMENTS:
        (directory / f"{name}.json").write_text(schema_text(name))


if __name__ == "__main__":
    write_all(Path(sys.argv[1]) if len(sys.argv) > 1 else DIRECTORY)
