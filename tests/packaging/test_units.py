"""What systemd says about the shipped units, users and directories, and what they share with the code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from petalsd.cli.exit_codes import EXIT_BAD_CONFIG
from petalsd.config import DaemonSection
from tests.packaging.commands import PACKAGING

SYSTEMD = PACKAGING / "systemd"
EXAMPLES = PACKAGING / "examples"
DOCS = PACKAGING.parent / "docs"
SERVICE = "petalsd@demo.service"
MAX_EXPOSURE = 2.0


def run(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    """Skips where the tool of systemd is missing."""
    if shutil.which(argv[0]) is None:
        pytest.skip(f"{argv[0]} is not installed")
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A file system with systemd's own units, ours, and our commands."""
    own_units = Path("/usr/lib/systemd/system")
    if not own_units.is_dir():
        pytest.skip("systemd is not installed")
    units = tmp_path / "usr/lib/systemd/system"
    shutil.copytree(own_units, units, symlinks=True)
    for unit in [*SYSTEMD.glob("*.service"), *SYSTEMD.glob("*.target")]:
        shutil.copy(unit, units)
    commands = tmp_path / "usr/bin"
    commands.mkdir()
    for command in ("petalsd", "petalsctl"):
        (commands / command).write_text("#!/bin/sh\n")
        (commands / command).chmod(0o755)
    return tmp_path


def add_drop_in(root: Path, name: str) -> None:
    directory = root / f"etc/systemd/system/{SERVICE}.d"
    directory.mkdir(parents=True)
    shutil.copy(EXAMPLES / name, directory)


def exposure(root: Path, unit: str) -> float:
    """systemd's figure from 0 (closed) to 10."""
    done = run("systemd-analyze", "security", "--offline=yes", f"--root={root}", "--no-pager", unit)
    figure = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert figure is not None, done.stdout + done.stderr
    return float(figure[1])


def settings(file: Path, section: str = "Service") -> dict[str, list[str]]:
    """Setting to its values, in order."""
    lines = file.read_text().partition(f"[{section}]\n")[2].partition("\n[")[0].splitlines()
    values: dict[str, list[str]] = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, _, value = line.partition("=")
            values.setdefault(name, []).append(value)
    return values


@pytest.mark.parametrize("unit", [SERVICE, "petalsd-wait-online@demo.service", "petalsd.target"])
def test_systemd_finds_no_fault(root: Path, unit: str) -> None:
    """`systemd-analyze verify` has nothing to say: no unknown setting, no missing unit, no missing command."""
    done = run("systemd-analyze", "verify", "--man=no", f"--root={root}", unit)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_example_of_a_gateway(root: Path) -> None:
    """systemd finds no fault with it, and it is as closed as a server's unit."""
    unit = "petalsd-gateway.service"
    shutil.copy(EXAMPLES / unit, root / "usr/lib/systemd/system")
    done = run("systemd-analyze", "verify", "--man=no", f"--root={root}", unit)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert exposure(root, unit) <= MAX_EXPOSURE


def test_a_fault_would_be_found(root: Path) -> None:
    """The check above sees a misspelt setting and a command that is not there."""
    (root / "usr/bin/petalsctl").unlink()
    unit = root / "usr/lib/systemd/system/petalsd@.service"
    unit.write_text(unit.read_text().replace("WatchdogSec=", "WatchDogSec="))
    done = run("systemd-analyze", "verify", "--man=no", f"--root={root}", SERVICE)
    assert done.returncode != 0
    assert "WatchDogSec" in done.stderr and "petalsctl" in done.stderr


def test_the_sandbox_is_tight(root: Path) -> None:
    """The unit for CPUs stays under the limit; the figures in the documentation are those of systemd 252."""
    plain, waiter = exposure(root, SERVICE), exposure(root, "petalsd-wait-online@demo.service")
    add_drop_in(root, "gpu.conf")
    gpu = exposure(root, SERVICE)
    assert max(plain, waiter) <= MAX_EXPOSURE
    if "systemd 252 " in run("systemd-analyze", "--version").stdout:
        stated = re.findall(r"exposure level (?:is|of) \*\*([\d.]+)\*\*", (DOCS / "install.md").read_text())
        assert [float(figure) for figure in stated] == [plain, gpu]


@pytest.mark.parametrize("name", ["gpu.conf", "restart-backoff.conf"])
def test_drop_ins_are_understood(root: Path, name: str) -> None:
    """Every setting of an example is one that systemd knows, or that its comment says is newer."""
    add_drop_in(root, name)
    done = run("systemd-analyze", "verify", "--man=no", f"--root={root}", SERVICE)
    unknown = set(re.findall(r"Unknown key (?:name )?'(\w+)'", done.stderr))
    newer = {"RestartSteps", "RestartMaxDelaySec"} if name == "restart-backoff.conf" else set()
    assert unknown <= newer
    if not unknown:
        assert (done.returncode, done.stderr) == (0, "")


def test_compilers_may_run() -> None:
    """Triton and Inductor execute memory that they wrote; the reason stands where an auditor looks for it."""
    text = (SYSTEMD / "petalsd@.service").read_text()
    assert "MemoryDenyWriteExecute" not in settings(SYSTEMD / "petalsd@.service")
    assert re.search(r"#\s+MemoryDenyWriteExecute=\s+Triton", text)
    assert "MemoryDenyWriteExecute" in (DOCS / "install.md").read_text()


def test_times_agree_with_the_daemon() -> None:
    """A stop may take as long as a drain; a wrong command line or configuration is not tried again."""
    service = settings(SYSTEMD / "petalsd@.service")
    assert float(service["TimeoutStopSec"][0].removesuffix("s")) > DaemonSection().drain_deadline_s
    assert service["RestartPreventExitStatus"] == [f"2 {EXIT_BAD_CONFIG}"]
    assert service["Type"] == ["notify"] and service["NotifyAccess"] == ["main"]


def test_every_cache_is_in_the_cache_directory() -> None:
    """The user has no home: nothing may look for one."""
    service = settings(SYSTEMD / "petalsd@.service")
    variables = dict(word.split("=", 1) for line in service["Environment"] for word in line.split())
    caches = {name for name, value in variables.items() if value.startswith("%C/petalsd")}
    assert caches == {
        "XDG_CACHE_HOME",
        "HF_HOME",
        "TRITON_CACHE_DIR",
        "TORCHINDUCTOR_CACHE_DIR",
        "CUDA_CACHE_PATH",
    }
    assert variables["PYTHONSAFEPATH"] == "1"


def test_enabled_instances_start_with_the_machine() -> None:
    """An instance belongs to the target, and the target to the machine's normal state; both stop together."""
    assert settings(SYSTEMD / "petalsd@.service", "Install") == {"WantedBy": ["petalsd.target"]}
    assert settings(SYSTEMD / "petalsd@.service", "Unit")["PartOf"] == ["petalsd.target"]
    assert settings(SYSTEMD / "petalsd.target", "Install") == {"WantedBy": ["multi-user.target"]}


def test_the_user_is_made(tmp_path: Path) -> None:
    """A system user without a home or a shell, and a group of the same name."""
    (tmp_path / "etc").mkdir()
    done = run("systemd-sysusers", f"--root={tmp_path}", SYSTEMD / "petalsd.sysusers")
    if "Operation not permitted" in done.stderr:
        pytest.skip("making users below another root needs root")
    assert done.returncode == 0, done.stderr
    (user,) = (tmp_path / "etc/passwd").read_text().splitlines()
    name, _, uid, gid, _, home, shell = user.split(":")
    assert (name, home, shell) == ("petalsd", "/", "/usr/sbin/nologin")
    assert (tmp_path / "etc/group").read_text() == f"petalsd:x:{gid}:\n"
    assert int(uid) < 1000


def test_the_directories_are_made(tmp_path: Path) -> None:
    """Sockets can be looked for by everybody, weights are the service's own."""
    if os.geteuid() != 0:
        pytest.skip("giving directories to another user needs root")
    (tmp_path / "etc").mkdir()
    run("systemd-sysusers", f"--root={tmp_path}", SYSTEMD / "petalsd.sysusers")
    done = run("systemd-tmpfiles", "--create", f"--root={tmp_path}", SYSTEMD / "petalsd.tmpfiles")
    assert (done.returncode, done.stderr) == (0, "")
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in ("run/petalsd", "var/cache/petalsd")}
    assert modes == {"run/petalsd": 0o755, "var/cache/petalsd": 0o700}
    uid = int((tmp_path / "etc/passwd").read_text().split(":")[2])
    assert [(tmp_path / name).stat().st_uid for name in ("run/petalsd", "var/cache/petalsd")] == [0, uid]
