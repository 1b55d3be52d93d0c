"""The documentation says what the program does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from petalsd.config_reference import MARKER, key_tables

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


def test_every_configuration_key_is_documented_as_it_is() -> None:
    """docs/configure.md holds the tables that the configuration itself gives; `make docs` writes them."""
    _, _, tables = (ROOT / "docs" / "configure.md").read_text().partition(MARKER)
    assert tables.strip() == key_tables().strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link of a page names a file of the repository."""
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_readme_names_only_targets_that_exist() -> None:
    """Every `make TARGET` in the pages is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"`make ([a-z-]+)", page.read_text())}
    assert named <= targets
