"""The documentation says what the program does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from petalsd.config_reference import FORMS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize(
    "page", ["docs/configure.md", "packaging/man/petalsd.toml.5", "packaging/petalsd.toml"]
)
def test_every_configuration_key_is_documented_as_it_is(page: str) -> None:
    """The pages hold what the configuration itself says about its keys; `make docs` writes it."""
    form = FORMS[Path(page).suffix]
    head, marker, written = (ROOT / page).read_text().partition(form.marker)
    assert head and marker
    assert written.strip() == form.written().strip()


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
