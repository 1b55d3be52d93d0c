"""The manual pages render without complaints and name every verb and option."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.packaging.commands import PACKAGING, all_options, verbs

PAGES = sorted((PACKAGING / "man").iterdir())
PAGE_OF = {"petalsd": "petalsd.8", "petalsctl": "petalsctl.1"}


def rendered(page: Path) -> str:
    """As on a terminal, without its overstrikes."""
    if shutil.which("man") is None:
        pytest.skip("man is not installed")
    done = subprocess.run(
        ["man", "--warnings=w", "--local-file", str(page)],
        capture_output=True, text=True, timeout=60,
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "MANWIDTH": "200", "MAN_KEEP_FORMATTING": ""},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return re.sub(r".\x08", "", done.stdout)


def test_the_pages_that_the_package_installs() -> None:
    """One page per command and one for the file."""
    assert [page.name for page in PAGES] == ["petalsctl.1", "petalsd.8", "petalsd.toml.5"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_renders_without_warnings(page: Path) -> None:
    """Each has a title, a name line for whatis(1), and no macro that the formatter does not know."""
    text = rendered(page)
    name, section = page.name.rsplit(".", 1)
    assert text.startswith(f"{name.upper()}({section})")
    assert re.search(rf"^NAME\n +{re.escape(name)} (-|–|—|--) \S", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_mandoc_is_content(page: Path) -> None:
    """The stricter of the two formatters finds no warning and no error."""
    if shutil.which("mandoc") is None:
        pytest.skip("mandoc is not installed")
    done = subprocess.run(
        ["mandoc", "-Tlint", "-Wwarning", str(page)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("command", verbs())
def test_every_verb_and_option_is_described(command: str) -> None:
    """The page of a command has each verb as a heading of its list, and each option as a word."""
    text = rendered(PACKAGING / "man" / PAGE_OF[command])
    words = set(re.findall(r"(?<![\w-])-{1,2}[a-z][a-z-]*", text))
    options = set().union(*(options for (owner, _), options in all_options().items() if owner == command))
    assert options - words <= {"-h", "--help"}
    missing = [verb for verb in verbs()[command] if not re.search(rf"^ +{verb}\b", text, re.MULTILINE)]
    assert missing == []


def test_every_exit_status_is_described() -> None:
    """What scripts rely on is written down."""
    from petalsd.cli import exit_codes as petalsd
    from petalsd.cli.petalsctl import exit_codes as petalsctl

    for command, module in (("petalsd", petalsd), ("petalsctl", petalsctl)):
        section = rendered(PACKAGING / "man" / PAGE_OF[command]).partition("\nEXIT STATUS\n")[2]
        described = {int(code) for code in re.findall(r"^ +(\d+) ", section, re.MULTILINE)}
        assert {value for name, value in vars(module).items() if name.startswith("EXIT_")} <= described
