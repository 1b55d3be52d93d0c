"""The harness itself: what happens in a lab stays there, and it never outlives the tests."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from tests.systemd.lab import Lab

pytestmark = [pytest.mark.systemd, pytest.mark.usefixtures("able")]

END_S = 20.0
_MAKE_AND_TELL = (
    "from tests.systemd.lab import Lab\n"
    "with Lab() as lab:\n"
    "    print(lab.pid, lab.keeper_pid, lab.cgroup, lab.room, flush=True)\n"
    "    input()\n"
)


def test_it_is_a_booted_system_of_its_own() -> None:
    """systemd is PID 1, it starts units, and the only network is loopback."""
    with Lab() as lab:
        assert lab.run(["cat", "/proc/1/comm"]).stdout == "systemd\n"
        lab.write("/etc/systemd/system/one.service", "[Service]\nType=oneshot\nExecStart=/bin/echo hello\n")
        lab.systemctl("daemon-reload")
        lab.systemctl("start", "one")
        assert "hello" in [entry.message for entry in lab.journal("one.service")]
        assert lab.show("one", "Result", "ExecMainStatus") == {"Result": "success", "ExecMainStatus": "0"}
        links = lab.run(["cat", "/proc/net/dev"]).stdout.splitlines()[2:]
        assert [link.split(":")[0].strip() for link in links] == ["lo"]


def test_it_leaves_nothing_behind(tmp_path: Path) -> None:
    """No change of the host's files, no process, no control group, no mount."""
    host_file = tmp_path / "file"
    host_file.write_text("host")
    with Lab({tmp_path: "/srv/bound"}) as lab:
        lab.write("/etc/petalsd-lab-test", "inside")
        assert lab.path("/srv/bound/file").read_text() == "host"
        assert lab.run(["touch", "/srv/bound/file"], check=False).returncode != 0
        sleeper = lab.spawn(["sleep", "1000"])
        ended = os.pidfd_open(lab.pid)
        assert lab.cgroup.exists()
    assert sleeper.returncode not in (None, 0)
    _assert_ends(ended)
    assert not Path("/etc/petalsd-lab-test").exists()
    _assert_gone(lab.cgroup, lab.room)


def test_it_ends_with_the_process_that_made_it() -> None:
    """A test run that is killed leaves no systemd running, and nothing else."""
    root = Path(__file__).parents[2]
    maker = subprocess.Popen(
        [sys.executable, "-c", _MAKE_AND_TELL],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
    )
    assert maker.stdout is not None
    pid, keeper_pid, cgroup, room = maker.stdout.readline().split()
    systemd, keeper = os.pidfd_open(int(pid)), os.pidfd_open(int(keeper_pid))
    maker.kill()
    maker.communicate(timeout=END_S)
    _assert_ends(systemd)
    _assert_ends(keeper)
    _assert_gone(Path(cgroup), Path(room))


def test_its_life_is_bounded() -> None:
    with Lab(life_s=1.0) as lab:
        _assert_ends(os.pidfd_open(lab.pid))
    _assert_gone(lab.cgroup, lab.room)


def _assert_ends(pidfd: int) -> None:
    try:
        assert select.select([pidfd], [], [], END_S)[0], "a process of the lab still runs"
    finally:
        os.close(pidfd)


def _assert_gone(cgroup: Path, room: Path) -> None:
    assert not cgroup.exists()
    assert not room.exists()
    assert room.name not in Path("/proc/self/mounts").read_text()
