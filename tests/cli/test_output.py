"""Standard output of the commands, interrupted at any moment."""

from __future__ import annotations

import re
import subprocess
import sys

WRITER = """
import signal
from petalsd.cli.output import watched_output

is_armed = False

def interrupt(number, frame):
    global is_armed
    if is_armed:
        is_armed = False
        raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
with watched_output():
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    for line in range(30000):
        try:
            is_armed = True
            print(f"<{line}>", flush=True)
            is_armed = False
        except KeyboardInterrupt:
            pass
    signal.setitimer(signal.ITIMER_REAL, 0)
"""


def test_what_is_out_when_ctrl_c_comes_is_not_written_again() -> None:
    """A frame of progress stood twice on the screen, and the ^C between the two."""
    done = subprocess.run([sys.executable, "-c", WRITER], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"<\d+>", done.stdout)
    assert len(lines) > 1000
    assert len(lines) == len(set(lines))
