"""The documentation says what the program does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from petalsd.config_loading import known_keys
from petalsd.config_reference import FORMS
from petalsd.swarm.faults import CODES

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
    """Every relative link of a page names a file of the repository, and a heading that the file has."""
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """What links may name of it, as GitHub makes it of headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_error_on_the_wire_has_its_row() -> None:
    """What a peer may be told is explained where one looks for it."""
    page = (ROOT / "docs" / "troubleshoot.md").read_text()
    explained = set(re.findall(r"`(\w+)(?:: [^`]*)?`", page))
    assert CODES - explained == set()


def test_the_readme_names_only_targets_that_exist() -> None:
    """Every `make TARGET` in the pages is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"`make ([a-z-]+)", page.read_text())}
    assert named <= targets


def test_every_flag_of_petals_has_its_row() -> None:
    """Those that the page on the wire lists, of its server and of its bootstrap node; and all keys are ours."""
    page = (ROOT / "docs" / "from-petals.md").read_text()
    wire = (ROOT / "docs" / "protocol.md").read_text()
    flags = wire.partition("### 7.1 run_server")[2].partition("## 8. ")[0]
    first_cells = re.findall(r"^\| (.*?) \|", flags, flags=re.MULTILINE)
    named = {flag for cell in first_cells for flag in re.findall(r"--\w+", cell)}
    assert len(named) > 40
    assert named - set(re.findall(r"--\w+", page)) == set()
    sections = "|".join(sorted({key.partition(".")[0] for key in known_keys()}))
    keys = set(re.findall(rf"`((?:{sections})\.\w+)", page))
    assert len(keys) > 25
    assert keys - set(known_keys()) == set()
