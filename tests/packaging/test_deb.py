"""What is in the Debian package, and what is not. Its life under systemd: tests/systemd/test_package.py."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.packaging.package import ENVIRONMENT, ROOT, built_package, field, missing, take_apart

pytestmark = [pytest.mark.deb, pytest.mark.slow]

SITE_PACKAGES = f"{ENVIRONMENT}/lib/python3.*/site-packages"


@pytest.fixture(scope="module")
def package() -> Path:
    if reason := missing():
        pytest.skip(reason)
    return built_package()


@pytest.fixture(scope="module")
def tree(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("package") / "tree"
    take_apart(package, tree)
    return tree


def test_its_version_is_the_projects(package: Path) -> None:
    """And says which torch is in it; the changelog agrees."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.fullmatch(rf"{re.escape(version)}\+(cpu|cuda)", field(package, "Version"))
    changelog = (ROOT / "packaging/deb/debian/changelog").read_text()
    assert changelog.startswith(f"petalsd ({version}) ")


def test_it_needs_the_python_that_it_was_built_with(package: Path, tree: Path) -> None:
    """The environment links to the system's interpreter and has directories of its version."""
    (libraries,) = (tree / ENVIRONMENT / "lib").iterdir()
    minor = int(libraries.name.removeprefix("python3."))
    depends = field(package, "Depends")
    assert f"python3 (>= 3.{minor}), python3 (<< 3.{minor + 1})" in depends
    assert "libc6" in depends and "libstdc++6" in depends
    assert (tree / ENVIRONMENT / "bin/python3").readlink() == Path("../../../bin/python3")


def test_what_an_administrator_looks_for(tree: Path) -> None:
    """Commands, units, user, manual pages, completions, examples."""
    wanted = [
        "lib/systemd/system/petalsd@.service", "lib/systemd/system/petalsd.target",
        "lib/systemd/system/petalsd-wait-online@.service",
        "usr/lib/sysusers.d/petalsd.conf", "usr/lib/tmpfiles.d/petalsd.conf",
        "usr/share/man/man1/petalsctl.1.gz", "usr/share/man/man5/petalsd.toml.5.gz",
        "usr/share/man/man8/petalsd.8.gz",
        "usr/share/bash-completion/completions/petalsd", "usr/share/bash-completion/completions/petalsctl",
        "usr/share/zsh/vendor-completions/_petalsd",
        "usr/share/fish/vendor_completions.d/petalsd.fish", "usr/share/fish/vendor_completions.d/petalsctl.fish",
        "usr/share/doc/petalsd/examples/petalsd.toml", "usr/share/doc/petalsd/examples/gpu.conf",
        "usr/share/doc/petalsd/examples/petalsd.rules.yml", "usr/share/doc/petalsd/copyright",
    ]  # fmt: skip
    assert [path for path in wanted if not (tree / path).is_file()] == []
    assert [(tree / "usr/bin" / name).readlink() for name in ("petalsd", "petalsctl")] == [
        Path("../lib/petalsd/bin/petalsd"),
        Path("../lib/petalsd/bin/petalsctl"),
    ]
    assert list((tree / "etc/petalsd").iterdir()) == []


def test_its_petalsd_is_that_of_the_checkout(tree: Path) -> None:
    """Every module and data file, the extension, and the licence."""
    (installed,) = tree.glob(f"{SITE_PACKAGES}/petalsd")
    listed = subprocess.run(
        ["git", "ls-files", "petalsd/*.py", "petalsd/*.json"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=30,
    ).stdout.splitlines()  # fmt: skip
    assert [name for name in listed if not (installed.parent / name).is_file()] == []
    assert len(list(installed.glob("_C.*.so"))) == 1
    (licence,) = installed.parent.glob("petalsd-*.dist-info/licenses/LICENSE")
    assert licence.read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_nothing_is_in_it_that_a_server_never_needs(tree: Path) -> None:
    """No installer, no headers, no test suites; only our commands beside the interpreter."""
    (packages,) = tree.glob(SITE_PACKAGES)
    unwanted = [
        *packages.glob("pip*"),
        *packages.glob("**/tests"),
        packages / "torch/include",
        *packages.glob("**/*.a"),
    ]
    assert [path for path in unwanted if path.exists()] == []
    programs = {path.name for path in (tree / ENVIRONMENT / "bin").iterdir()}
    assert programs - {"petalsd", "petalsctl"} == {
        name for name in programs if re.fullmatch(r"python[\d.]*", name)
    }


def test_nothing_tells_of_the_machine_that_built_it(tree: Path) -> None:
    """The environment knows the place where it is installed, not the one where it was made."""
    staged = str(ROOT / "build").encode()
    files = [*(tree / ENVIRONMENT / "bin").glob("petals*"), tree / ENVIRONMENT / "pyvenv.cfg"]
    files += [path for path in tree.glob(f"{SITE_PACKAGES}/petalsd*/**/*") if path.is_file()]
    assert len(files) > 200
    assert [path for path in files if staged in path.read_bytes()] == []
    for command in ("petalsd", "petalsctl"):
        first = (tree / ENVIRONMENT / "bin" / command).read_text().splitlines()[0]
        assert first == f"#!/{ENVIRONMENT}/bin/python3 -sP"


def test_every_module_of_petalsd_is_compiled(tree: Path) -> None:
    """The service may not write there, and a command has no time to compile."""
    (installed,) = tree.glob(f"{SITE_PACKAGES}/petalsd")
    modules = list(installed.rglob("*.py"))
    assert len(modules) > 100
    compiled = [
        list((module.parent / "__pycache__").glob(f"{module.stem}.cpython-*.pyc")) for module in modules
    ]
    assert all(len(files) == 1 for files in compiled)
    flags = {int.from_bytes(files[0].read_bytes()[4:8], "little") for files in compiled}
    assert flags == {1}, "compared with the times of the sources, which dpkg changes"
