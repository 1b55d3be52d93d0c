"""petalsd in a lab: the shipped units and users, and the commands as small wrappers of this checkout's Python.

Nothing is copied: the interpreter, its packages and the checkout are bound, read-only, to where the service's user
and its sandbox can see them (they may live in somebody's home, which ``ProtectHome=`` hides).
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import petalsd
from tests.systemd.lab import Lab

PACKAGING = Path(__file__).parents[2] / "packaging" / "systemd"
_HOME = "/opt/petalsd"
_PYTHON = f"{_HOME}/python"
_PACKAGES = f"{_HOME}/venv/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
_CHECKOUT = f"{_HOME}/checkout"
# A dynamic libpython is found through the cache: children of the daemon get no LD_LIBRARY_PATH.
_LIBRARY_PATHS = "/etc/ld.so.conf.d/petalsd-lab.conf"
# As shipped, but for times that a test can wait for.
FAST = """[Service]
RestartSec=100ms
Environment=OMP_NUM_THREADS=1
"""


def binds() -> dict[Path, str]:
    """For ``Lab``."""
    return {
        Path(sys.base_prefix): _PYTHON,
        Path(sysconfig.get_path("purelib")): _PACKAGES,
        Path(petalsd.__file__).parents[1]: _CHECKOUT,
    }


FAULTY = "/usr/bin/petalsd-faulty"


def install(lab: Lab) -> None:
    """What the package does on a machine: commands, units, users, directories."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    lab.write(f"{_HOME}/venv/pyvenv.cfg", f"home = {_PYTHON}/bin\ninclude-system-site-packages = false\n")
    lab.run(["mkdir", "-p", f"{_HOME}/venv/bin"])
    lab.run(["ln", "-s", f"{_PYTHON}/bin/{name}", f"{_HOME}/venv/bin/python"])
    lab.write(_LIBRARY_PATHS, f"{_PYTHON}/lib\n")
    lab.run(["ldconfig"])
    for command, module in (("petalsd", "petalsd"), ("petalsctl", "petalsd.cli.petalsctl.main")):
        lab.write(f"/usr/bin/{command}", wrapper("-m", module), mode=0o755)
    lab.write(f"{_HOME}/faulty_petalsd.py", Path(__file__).with_name("faulty_petalsd.py").read_text())
    lab.write(FAULTY, wrapper(f"{_HOME}/faulty_petalsd.py"), mode=0o755)
    for unit in ("petalsd@.service", "petalsd-wait-online@.service", "petalsd.target"):
        lab.write(f"/lib/systemd/system/{unit}", (PACKAGING / unit).read_text())
    lab.write("/usr/lib/sysusers.d/petalsd.conf", (PACKAGING / "petalsd.sysusers").read_text())
    lab.write("/usr/lib/tmpfiles.d/petalsd.conf", (PACKAGING / "petalsd.tmpfiles").read_text())
    lab.write("/etc/systemd/system/petalsd@.service.d/fast.conf", FAST)
    lab.run(["systemd-sysusers", "petalsd.conf"])
    lab.run(["systemd-tmpfiles", "--create", "petalsd.conf"])
    lab.systemctl("daemon-reload")


def wrapper(*words: str) -> str:
    """A command that runs this checkout with the lab's Python."""
    return f'#!/bin/sh\nPYTHONPATH={_CHECKOUT} exec {_HOME}/venv/bin/python {" ".join(words)} "$@"\n'
