"""The page pool under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("sanitize.sh")


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler: g++")
def test_the_pool_is_clean_under_sanitizers(tmp_path: Path) -> None:
    """Random calls, alone and from two threads, end without a report, with every row reading its own tokens."""
    done = subprocess.run([SCRIPT, tmp_path], capture_output=True, text=True, timeout=840, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "thread: together" in done.stdout
