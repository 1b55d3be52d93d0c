"""The layers: who may import whom, and what an import may cost."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "petalsd"

# Imports point downward only: a package may import those of a lower rank and itself. The modules of rank 0 may
# import each other.
RANKS = {
    "demo": 9,
    "cli": 8,
    "daemon": 7, "gateway": 7,
    "client": 6,
    "swarm": 5, "control": 5,
    "engine": 4,
    "kvcache": 3, "models": 3,
    "ops": 2,
    "kernels": 1, "_C": 1,
    "alarm": 0, "bootstrap_status": 0, "config": 0, "config_addresses": 0, "config_loading": 0,
    "config_reference": 0, "control_groups": 0, "deferred_imports": 0, "device_faults": 0, "errors": 0,
    "file_locks": 0, "imports": 0, "instruments": 0, "journal": 0, "log": 0, "log_limits": 0, "metrics": 0,
    "metrics_reference": 0, "paths": 0, "redaction": 0, "status": 0, "status_schemas": 0, "systemd": 0, "types": 0,
}  # fmt: skip

# Third-party packages that only these layers may import, with the reason.
RESERVED = {
    "hivemind": ({"swarm"}, "one layer knows the network library, so that it can be replaced"),
    "multiaddr": ({"swarm"}, "addresses are text everywhere else"),
    "torch": (
        {
            "ops",
            "kernels",
            "kvcache",
            "models",
            "engine",
            "swarm",
            "client",
            "daemon",
            "gateway",
            "cli",
            "demo",
        },
        "the leaves and the command line's start must stay light",
    ),
    "triton": ({"ops", "kernels"}, "a server on a CPU has none"),
    "aiohttp": ({"control", "gateway"}, "all others are asked through these"),
    "prometheus_client": ({"metrics"}, "one leaf knows how figures are exposed"),
    "sdnotify": ({"systemd"}, "one leaf speaks to systemd"),
    "transformers": (
        {"models", "client", "gateway", "demo", "cli"},
        "the engine knows blocks, not model classes",
    ),
}

# Modules that a command imports before it knows what to do: they must start fast.
LIGHT_MODULES = [
    "petalsd",
    "petalsd.errors",
    "petalsd.types",
    "petalsd.config",
    "petalsd.log",
    "petalsd.cli.main",
]


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def layer(path: Path) -> str:
    """ "petalsd/engine/step.py" -> "engine"; "petalsd/errors.py" -> "errors"."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_names(path: Path) -> Iterator[str]:
    """Full dotted names of everything the module imports, in functions too; type-checking imports count."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            if node.module == "petalsd":
                yield from (f"petalsd.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_every_layer_has_a_rank() -> None:
    """A new package or top-level module must be given its place in the table."""
    layers = {layer(path) for path in modules()} - {"__init__", "__main__"}
    assert layers - set(RANKS) == set()


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path: Path) -> None:
    """No module imports a layer of its own rank or above, other than itself."""
    own = layer(path)
    if own in ("__init__", "__main__"):
        return
    for name in imported_names(path):
        top, _, rest = name.partition(".")
        if top == "petalsd" and rest:
            target = rest.split(".")[0]
            if target == "__version__" or target == own:
                continue
            same_leaf_rank = RANKS[own] == RANKS[target] == 0
            assert RANKS[target] < RANKS[own] or same_leaf_rank, f"{own} must not import {target}"
        elif top in RESERVED:
            allowed, reason = RESERVED[top]
            assert own in allowed, f"{own} must not import {top}: {reason}"


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_light_modules_do_not_load_torch(module: str) -> None:
    """Importing a light module loads neither torch nor hivemind nor transformers, and prints nothing."""
    code = (
        f"import sys, {module}; "
        "loaded = {'torch', 'hivemind', 'transformers'} & set(sys.modules); "
        "sys.exit(f'loads {loaded}' if loaded else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_daemon_has_its_imports_behind_it_when_it_makes_a_config() -> None:
    """The first one makes transformers import a thousand modules: no garbage is to be searched among them."""
    code = (
        "import sys, petalsd.daemon.assembly; from transformers import LlamaConfig; before = len(sys.modules); "
        "LlamaConfig(); sys.exit(len(sys.modules) - before > 50)"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=100).returncode == 0


def test_a_bootstrap_node_loads_neither_models_nor_an_engine() -> None:
    """It is for small machines, and starts in half the time."""
    code = (
        "import sys, petalsd.daemon.bootstrap.assembly; "
        "heavy = {'transformers', 'petalsd.engine', 'petalsd.models', 'petalsd._C'} & set(sys.modules); "
        "sys.exit(f'loads {heavy}' if heavy else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=100
    )
    assert (result.returncode, result.stderr) == (0, "")
