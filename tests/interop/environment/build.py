"""Builds ``.venv-petals``, the environment of stock Petals 2.2.0.post1 for interop tests and benchmarks.

    python tests/interop/environment/build.py [--force]

Needs Python 3.11 for the new environment (this script itself runs on any Python from 3.9) and a package index
that pip can reach. A stamp with the hash of the inputs makes every later run return at once; a changed input or
an interrupted build starts from an empty environment.
"""
# ruff: noqa: T201 - a command that talks to whoever runs it

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE.parents[2] / ".venv-petals"
PYTHON = ENVIRONMENT / "bin" / "python"
STAMP = ENVIRONMENT / "petalsd-inputs.sha256"
BUILD_LOG = ENVIRONMENT / "build.log"

REEXPORTS = HERE / "hivemind_reexports.py"
REQUIREMENTS = HERE / "requirements.txt"
WITHOUT_DEPENDENCIES = HERE / "requirements-without-dependencies.txt"
CONSTRAINTS = HERE / "constraints.txt"
INPUTS = (REQUIREMENTS, WITHOUT_DEPENDENCIES, CONSTRAINTS, REEXPORTS)

WANTED_VERSION = "3.11"
REPORT_EVERY_S = 10.0


class BuildError(Exception):
    """The environment cannot be built; the text says what to do."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Build .venv-petals for the interop tests.")
    parser.add_argument("--force", action="store_true", help="build again even if nothing changed")
    force: bool = parser.parse_args().force
    digest = inputs_digest()
    if not force and is_current(digest):
        return 0
    try:
        with building_alone():
            if force or not is_current(digest):
                build(digest)
    except (BuildError, OSError) as error:
        print(f"petals environment: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\npetals environment: interrupted; the next run starts again", file=sys.stderr)
        return 130
    return 0


def inputs_digest() -> str:
    """SHA-256 over the names and contents of everything that decides what gets installed."""
    digest = hashlib.sha256()
    for path in INPUTS:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def is_current(digest: str) -> bool:
    return PYTHON.exists() and STAMP.exists() and STAMP.read_text().strip() == digest


@contextlib.contextmanager
def building_alone() -> Iterator[None]:
    """Holds a lock on this directory, so that two builds at once do not write into one environment."""
    descriptor = os.open(HERE, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("another build is running, waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def build(digest: str) -> None:
    started = time.monotonic()
    python = find_python()
    report(f"building {ENVIRONMENT.name} with {python} (once, about two minutes)")
    STAMP.unlink(missing_ok=True)
    run_step("creating the environment", [python, "-m", "venv", "--clear", str(ENVIRONMENT)])
    install("installing torch, transformers and hivemind", "-r", REQUIREMENTS, "-c", CONSTRAINTS)
    install("installing petals", "--no-deps", "-r", WITHOUT_DEPENDENCIES)
    install_reexports()
    run_step("importing petals", [str(PYTHON), "-W", "ignore", "-c", "import petals.server.server, petals"])
    STAMP.write_text(digest + "\n")
    report(f"ready after {time.monotonic() - started:.0f} s")


def find_python() -> str:
    """An interpreter of the wanted version: $PETALS_PYTHON, the PATH, or the one that runs this script."""
    candidates = [os.environ.get("PETALS_PYTHON"), shutil.which(f"python{WANTED_VERSION}"), sys.executable]
    for candidate in filter(None, candidates):
        if version_of(candidate) == WANTED_VERSION:
            return candidate
    raise BuildError(
        f"Python {WANTED_VERSION} is needed, because Petals 2.2 runs on no later one, and was not found.\n"
        f"Install it (Debian 12: apt install python3.11 python3.11-venv) or set PETALS_PYTHON to its path."
    )


def version_of(python: str) -> str | None:
    """``major.minor`` of an interpreter, or None when it does not run (a pyenv shim without its version)."""
    command = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def install(what: str, *arguments: object) -> None:
    """Compiled is what is imported, when it is: a fraction of all that comes along."""
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    run_step(what, [*pip, "install", "--no-compile", "--progress-bar=off", *map(str, arguments)])


def install_reexports() -> None:
    site_packages = ENVIRONMENT / "lib" / f"python{WANTED_VERSION}" / "site-packages"
    shutil.copyfile(REEXPORTS, site_packages / REEXPORTS.name)
    (site_packages / f"{REEXPORTS.stem}.pth").write_text(f"import {REEXPORTS.stem}\n")


def run_step(what: str, command: Sequence[str]) -> None:
    """Run a command with its output in the build log, and tell every ten seconds that it still runs."""
    report(what)
    ENVIRONMENT.mkdir(exist_ok=True)
    # The log is opened anew by each step: `venv --clear` removes it with the rest.
    with BUILD_LOG.open("a+") as log:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            code = wait_reporting(process, what, started)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(timeout=30)
        if code != 0:
            log.seek(0)
            tail = "".join(log.readlines()[-20:])
            raise BuildError(
                f"{what} failed (exit code {code}):\n{tail}\n"
                f"Command: {' '.join(command)}\nWhole log: {BUILD_LOG}\n"
                "If pip could not download, check its index configuration (pip config list) and run this again."
            )


def wait_reporting(process: subprocess.Popen[bytes], what: str, started: float) -> int:
    while True:
        try:
            return process.wait(timeout=REPORT_EVERY_S)
        except subprocess.TimeoutExpired:
            report(f"{what}, {time.monotonic() - started:.0f} s")


def report(text: str) -> None:
    print(f"petals environment: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
