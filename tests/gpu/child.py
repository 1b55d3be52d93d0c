"""Programs for tests on a real GPU: they need compiled kernels, and the tests' own process interprets them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def run_compiled(module: str, *arguments: str, timeout_s: float) -> Any:
    """What ``python -m module`` prints as JSON in its last line."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=environment, capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
