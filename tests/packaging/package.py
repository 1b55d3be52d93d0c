"""The Debian package that `make deb` built, taken apart."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = "usr/lib/petalsd"


def missing() -> str | None:
    """Why there is no package to test; None when there is one."""
    if shutil.which("dpkg-deb") is None:
        return "dpkg is not installed"
    return None if _packages() else "there is no package in build/deb: make deb"


def built_package() -> Path:
    (package,) = _packages()
    return package


def field(package: Path, name: str) -> str:
    """Of the package's control file."""
    return _run("dpkg-deb", "--field", package, name).strip()


def take_apart(package: Path, directory: Path) -> None:
    """The package's files, and its scripts in DEBIAN/."""
    _run("dpkg-deb", "--raw-extract", package, directory)


def next_version(tree: Path, directory: Path, version: str) -> Path:
    """A package of the later ``version``, which its commands tell too, made of a package taken apart."""
    shutil.copytree(tree, directory / "tree", copy_function=_link, symlinks=True)
    control = directory / "tree/DEBIAN/control"
    old = next(line for line in control.read_text().splitlines() if line.startswith("Version: "))
    _rewrite(control, old, f"Version: {version}")
    (module,) = (directory / "tree" / ENVIRONMENT).glob("lib/python3*/site-packages/petalsd/__init__.py")
    shutil.rmtree(module.parent / "__pycache__")  # compiled modules are not compared with their source
    _rewrite(module, '__version__ = "', f'__version__ = "{version}" or "')
    package = directory / f"petalsd_{version}.deb"
    _run("dpkg-deb", "--root-owner-group", "-Zzstd", "-z1", "--build", directory / "tree", package)
    return package


def _packages() -> list[Path]:
    return sorted((ROOT / "build/deb").glob("petalsd_*.deb"))


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def _rewrite(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.unlink()  # it may be a link to a file that shall stay
    file.write_text(text.replace(old, new))


def _run(*argv: str | Path) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=120).stdout
