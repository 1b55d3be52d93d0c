"""What the package's scripts do to files, without the package: below another root, as dpkg asks for it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.packaging.commands import PACKAGING

SCRIPTS = PACKAGING / "deb" / "debian"
OURS = [
    "var/lib/petalsd/demo/identity.key",
    "var/cache/petalsd/weights/block",
    "etc/petalsd/demo.toml",
    "etc/systemd/system/petalsd.target.wants/petalsd@demo.service",
    "etc/credstore/petalsd.demo.hub-token",
    "etc/credstore.encrypted/petalsd.demo.hub-token",
]
OTHERS = [
    "etc/credstore/other.hub-token",
    "etc/systemd/system/petalsd@demo.service.d/gpu.conf",
    "var/lib/other/file",
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in (*OURS, *OTHERS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def postrm(root: Path, what: str) -> list[str]:
    """Which of the files are left."""
    environ = {"DPKG_ROOT": str(root), "PATH": "/usr/bin:/bin"}
    subprocess.run(["sh", str(SCRIPTS / "postrm"), what], env=environ, check=True, timeout=30)
    return [name for name in (*OURS, *OTHERS) if (root / name).exists()]


def test_a_removed_package_leaves_what_it_had(root: Path) -> None:
    assert postrm(root, "remove") == [*OURS, *OTHERS]


def test_a_purged_package_leaves_no_secrets(root: Path) -> None:
    """Identities, and the tokens for the Hub; what is not ours stays."""
    assert postrm(root, "purge") == OTHERS


def test_a_purge_of_what_is_not_there(tmp_path: Path) -> None:
    assert postrm(tmp_path, "purge") == []
