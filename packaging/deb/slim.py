"""Makes the environment of the package small and final: takes out what a server never needs, compiles the rest.

``slim.py --root debian/petalsd --prefix /usr/lib/petalsd --torch cpu``
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# What pip and venv leave behind, relative to the environment; patterns of pathlib.
LEFTOVERS = [
    "bin/[Aa]ctivate*",
    "include",
    "share",
    "**/site-packages/pip",
    "**/site-packages/pip-*.dist-info",
    "**/petalsd-*.dist-info/direct_url.json",  # names a directory of the machine that built it
    "**/__pycache__",
]

# Relative to site-packages.
NEEDLESS = [
    "**/tests",
    "**/*.a",
    "**/*.pxd",
    "**/*.pyx",
    "numpy/_core/include",
    "grpc_tools",  # makes Python of .proto files, which hivemind did when it was packaged
    "torch/include",  # for extensions and Inductor's C++; petalsd compiles neither
    "torch/share",
    "torch/test",
    "torch/utils/benchmark",
]
COMMANDS = ("petalsd", "petalsctl")
# The one file of torch/bin that torch looks for when it is imported.
TORCH_PROGRAM = "torch_shm_manager"

_FLAVOUR = (
    "import sys, torch; "
    "sys.exit(f'torch {torch.__version__} is a {kind} build' if (kind := 'cuda' if torch.version.cuda else 'cpu') "
    "!= sys.argv[1] else 0)"
)


def main() -> None:
    """Exits with a sentence when pip installed another build of torch than was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="where the package's files are staged")
    parser.add_argument("--prefix", required=True, help="of the environment, once installed")
    parser.add_argument("--torch", required=True, choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    environment = arguments.root / arguments.prefix.lstrip("/")
    check_flavour(environment, arguments.torch)
    remove(matches(environment, LEFTOVERS))
    remove(needless(next(environment.glob("lib/python3*/site-packages"))))
    finish_programs(environment, arguments.prefix)
    compile_all(arguments.root, environment)


def check_flavour(environment: Path, wanted: str) -> None:
    found = subprocess.run(
        [environment / "bin/python3", "-c", _FLAVOUR, wanted], stderr=subprocess.PIPE, text=True
    )
    if found.returncode:
        advice = "name an index that has the wanted build in PIP_INDEX_URL or PIP_EXTRA_INDEX_URL"
        sys.exit(f"TORCH={wanted}: {found.stderr.strip()}; {advice}")


def matches(directory: Path, patterns: list[str]) -> Iterator[Path]:
    for pattern in patterns:
        yield from sorted(directory.glob(pattern))


def needless(site_packages: Path) -> Iterator[Path]:
    yield from matches(site_packages, NEEDLESS)
    for program in site_packages.glob("torch/bin/*"):
        if program.name != TORCH_PROGRAM:
            yield program


def remove(paths: Iterator[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def finish_programs(environment: Path, prefix: str) -> None:
    """Our two commands stay, deaf to the caller's directory and user site; what tells of the build goes."""
    for program in (environment / "bin").iterdir():
        if program.name in COMMANDS:
            text = program.read_text()
            program.write_text(re.sub(r"\A#!.*\n", f"#!{prefix}/bin/python3 -sP\n", text))
        elif not re.fullmatch(r"python[\d.]*", program.name):
            program.unlink()
    settings = environment / "pyvenv.cfg"
    kept = [line for line in settings.read_text().splitlines() if not line.startswith("command")]
    settings.write_text("\n".join(kept) + "\n")


def compile_all(root: Path, environment: Path) -> None:
    """Nobody may write there later. Unchecked: dpkg sets other times of modification than the build."""
    command = [environment / "bin/python3", "-m", "compileall", "-qq", "-j0", "-s", root, "-p", "/"]
    # Some packages carry templates or examples that are no Python: those stay as they are.
    subprocess.run([*command, "--invalidation-mode", "unchecked-hash", environment / "lib"], check=False)


if __name__ == "__main__":
    main()
