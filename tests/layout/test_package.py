"""What is packaged is what is in the tree."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_package_is_declared() -> None:
    """pyproject.toml lists exactly the packages that exist; a directory of data is one to setuptools."""
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for kind in ("*.py", "*.json")
        for path in (ROOT / "petalsd").rglob(kind)
        if "kernels" not in path.relative_to(ROOT).parts
    }
    assert declared == found | {"petalsd.kernels"}


def test_kernels_is_a_link_without_an_init() -> None:
    """`kernels/` reaches the package by a link, and is no package of that name itself."""
    link = ROOT / "petalsd" / "kernels"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()
