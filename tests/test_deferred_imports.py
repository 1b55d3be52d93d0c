"""What libraries would import for nothing stays out, and is there when somebody asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

_HEAVY = (
    "torch._dynamo",
    "torch.distributed.tensor",
    "sympy",
    "transformers.activations",
    "scipy.optimize._optimize",
)
_SERVER = """
import sys
from petalsd.imports import heavy_imports
with heavy_imports():
    import petalsd.daemon.assembly
from transformers import CONFIG_MAPPING
CONFIG_MAPPING["llama"]()
"""


def run(program: str, **environment: str) -> list[str]:
    """The lines that are printed by a process of its own; an error of it fails the test."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_server_of_a_usual_model_imports_neither_compiler_nor_optimizers() -> None:
    (loaded,) = run(f"{_SERVER}print([name for name in {_HEAVY} if name in sys.modules])")
    assert loaded == "[]"


@pytest.mark.nightly
def test_what_was_left_out_is_there_for_those_who_use_it() -> None:
    lines = run(
        f"{_SERVER}import scipy.optimize, hivemind.averaging.load_balancing as balancing\n"
        "print(scipy.optimize.linprog([1.0], bounds=[(2.0, 3.0)]).x[0])\n"
        "print(balancing.load_balance_peers(100, [1.0, 1.0]))\n"
        "from transformers.activations import ACT2FN\n"
        "print(type(ACT2FN['silu']).__name__)"
    )
    assert lines == ["2.0", "(50, 50)", "SiLUActivation"]


@pytest.mark.nightly
def test_what_transformers_defines_is_listed_once_and_as_ever() -> None:
    """Hardly any of its many files is read again; the list is that of its own code."""
    lines = run(
        "import builtins, collections, importlib.util\n"
        "opened, usual = collections.Counter(), builtins.open\n"
        "def counting(file, *more, **named):\n"
        "    opened[str(file)] += 1\n"
        "    return usual(file, *more, **named)\n"
        "builtins.open = counting\n"
        f"{_SERVER}"
        "models = [count for file, count in opened.items() if '/transformers/models/' in file]\n"
        "print(len(models) > 1000, models.count(1) > 0.9 * len(models))\n"
        "from transformers.utils import import_utils\n"
        "name = 'transformers.utils.untouched'\n"
        "spec = importlib.util.spec_from_file_location(name, import_utils.__file__)\n"
        "untouched = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(untouched)\n"
        "import transformers.models\n"
        "place = transformers.models.__path__[0]\n"
        "print(import_utils.define_import_structure(place) == untouched.define_import_structure(place))"
    )
    assert lines == ["True True", "True"]


@pytest.mark.nightly
def test_checks_that_need_more_than_the_names_get_the_activations(tmp_path: Path) -> None:
    """As a later release of transformers may."""
    package = tmp_path / "transformers"
    (package / "utils").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "utils" / "__init__.py").touch()
    (package / "activations.py").write_text("ACT2FN = {'silu': 1}\nACT2CLS = {'silu': 2}\n")
    (package / "utils" / "type_validators.py").write_text("from ..activations import ACT2CLS, ACT2FN\n")
    program = (
        "from petalsd.deferred_imports import deferred_imports\n"
        "with deferred_imports():\n"
        "    from transformers.utils.type_validators import ACT2CLS, ACT2FN\n"
        "print(ACT2FN, ACT2CLS)"
    )
    assert run(program, PYTHONPATH=f"{tmp_path}:{ROOT}") == ["{'silu': 1} {'silu': 2}"]
