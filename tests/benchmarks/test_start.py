"""What counts as the memory of a server."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.suite import start
from tests.interop.child import Child

HELD_BYTES = 64 << 20
HELPER = f"held = b'x' * {HELD_BYTES}; print('held', flush=True); input()"
# The helper's input ends with the server.
SERVER = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", {HELPER!r}], stdin=subprocess.PIPE, start_new_session=True)
input()
"""


def test_processes_in_sessions_of_their_own_count(tmp_path: Path) -> None:
    """Such as the libp2p daemon of petalsd; that of stock Petals is in the server's own."""
    with Child([sys.executable, "-c", SERVER], tmp_path / "log", has_input=True) as child:
        child.wait_for("^held$", 30.0)
        assert start.server_bytes(child.pid) > HELD_BYTES
