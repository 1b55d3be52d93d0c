"""What a figure was measured on: processor, cores, load, software versions, commit; read from the system."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from tests.interop import stock

ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "hivemind", "transformers", "uvloop")
_PETALS_PACKAGES = ("petals", "torch", "transformers")


def describe() -> dict[str, str]:
    """One flat dictionary, the same keys everywhere, for JSON and for CSV columns.

    Versions of stock Petals and of what it runs on are empty where its environment is not there.
    """
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory_gib": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f}",
        "load_1_min": f"{os.getloadavg()[0]:.2f}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        **_petals_versions(),
    }


def _petals_versions() -> dict[str, str]:
    libraries = [str(path) for path in stock.PYTHON.parents[1].glob("lib/python*/site-packages")]
    found = {
        distribution.name: distribution.version
        for distribution in importlib.metadata.distributions(path=libraries)
        if distribution.name in _PETALS_PACKAGES
    }
    return {
        "petals" if name == "petals" else f"petals_{name}": found.get(name, "") for name in _PETALS_PACKAGES
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _commit() -> str:
    """Short hash of the commit, with ``+`` when petalsd itself differs from it."""
    commit = _git("rev-parse", "--short=10", "HEAD")
    return commit + ("+" if _git("status", "--porcelain", "--", "petalsd", "csrc", "kernels") else "")


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
