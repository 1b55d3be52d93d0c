"""Sizes: what fits on few screens is read; what does not is split by a noun of the field."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

from tests.conftest import LONG_FILES, TESTS

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("py", "pyi", "cpp", "hpp", "inc")
MAX_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 7


def source_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *(f"*.{end}" for end in SOURCES)],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]


PYTHON_FILES = [
    path for path in source_files() if path.suffix == ".py" and path.is_relative_to(ROOT / "petalsd")
]


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_short(path: Path) -> None:
    """No source file has more than 400 lines."""
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short_and_documented_modules(path: Path) -> None:
    """Each module says what it knows; no function has more than 60 lines or 7 parameters."""
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body, "the module has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{node.name} is too long"
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(argument.arg not in ("self", "cls") for argument in arguments)
            assert count <= MAX_PARAMETERS, f"{node.name} has {count} parameters: make a record"


def test_long_files_are_there() -> None:
    """A file that was renamed is begun first under its new name too."""
    assert [name for name in LONG_FILES if not (TESTS / name).is_file()] == []
