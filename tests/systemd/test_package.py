"""The Debian package in the life of a machine: installed, started, upgraded through a drain, removed, purged."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.packaging.package import built_package, field, missing, next_version, take_apart
from tests.systemd.clients import PROMPT, Generation, connect, generate, greedy
from tests.systemd.conftest import MODEL, Figure, MakeInstance
from tests.systemd.instances import Instance, maddr_of
from tests.systemd.lab import Lab

pytestmark = [
    pytest.mark.deb,
    pytest.mark.systemd,
    pytest.mark.swarm,
    pytest.mark.slow,
    pytest.mark.timeout(300),
]

PACKAGES = "/srv/packages"
NEXT_VERSION = "99+cpu"
MAX_ANSWER_S = 0.25


@pytest.fixture(scope="module")
def packages(able: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with this version and the next one: old.deb, new.deb."""
    if reason := missing():
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("packages")
    take_apart(built_package(), directory / "tree")
    (directory / "next").mkdir()
    (directory / "shelf").mkdir()
    next_version(directory / "tree", directory / "next", NEXT_VERSION).rename(directory / "shelf/new.deb")
    (directory / "shelf/old.deb").symlink_to(built_package())
    return directory / "shelf"


@pytest.fixture(scope="module")
def lab(packages: Path, tiny: PreTrainedModel, tiny_path: Path) -> Iterator[Lab]:
    """A machine with the package and nothing else of petalsd."""
    with Lab({packages: PACKAGES, built_package().parent: "/srv/built"}) as lab, lab.network():
        lab.run(
            ["rm", "-f", "/usr/sbin/policy-rc.d"]
        )  # where images of containers forbid packages to start services
        lab.run(["ln", "-s", f"/srv/built/{built_package().name}", "/srv/old.deb"])
        lab.run(["dpkg", "--install", "/srv/old.deb"], timeout_s=120)
        lab.copy(tiny_path, MODEL)
        yield lab


@pytest.fixture(scope="module")
def demo(instance: MakeInstance) -> Instance:
    """An enabled instance."""
    demo = instance("demo")
    demo.configure(MODEL)
    demo.lab.systemctl("enable", demo.unit)
    return demo


def active(lab: Lab, pattern: str = "petalsd*") -> set[str]:
    """Running units of ours."""
    lines = lab.systemctl("list-units", "--plain", "--no-legend", "--state=active,activating", pattern).stdout
    return {line.split()[0] for line in lines.splitlines()} - {"system-petalsd.slice"}


def exists(lab: Lab, path: str) -> bool:
    return lab.run(["test", "-e", path], check=False).returncode == 0


def test_an_installation_starts_nothing(lab: Lab) -> None:
    """There is a user, a target without instances, and empty directories."""
    assert active(lab) == {"petalsd.target"}
    assert lab.run(["getent", "passwd", "petalsd"]).stdout.rstrip().endswith(":/:/usr/sbin/nologin")
    modes = lab.run(
        ["stat", "--format=%n %U %a", "/run/petalsd", "/var/lib/petalsd", "/var/cache/petalsd"]
    ).stdout
    assert modes.split() == [
        *("/run/petalsd", "root", "755"),
        *("/var/lib/petalsd", "root", "755"),
        *("/var/cache/petalsd", "petalsd", "700"),
    ]


def test_systemd_and_man_find_all_that_the_units_name(lab: Lab) -> None:
    """`systemd-analyze verify` also looks for commands and manual pages."""
    for unit in ("petalsd@demo.service", "petalsd-wait-online@demo.service", "petalsd.target"):
        done = lab.run(["systemd-analyze", "verify", "--man=yes", unit], check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), unit


def test_commands_answer_at_once(lab: Lab, figure: Figure) -> None:
    """petalsctl from the package, its modules compiled; without a daemon it says what to do."""
    times_s: list[float] = []
    # The first one brings the files into memory, and others may have the cores for a while.
    while len(times_s) < 20 and min(times_s, default=MAX_ANSWER_S) >= MAX_ANSWER_S:
        began_s = time.monotonic()
        done = lab.run(["petalsctl", "status"], check=False)
        times_s.append(time.monotonic() - began_s)
    figure("petalsctl status, from the package", min(times_s))
    assert done.returncode == 2
    assert "none is configured in /etc/petalsd" in done.stderr
    assert min(times_s) < MAX_ANSWER_S


def test_it_serves(lab: Lab, demo: Instance, tiny: PreTrainedModel, tiny_path: Path) -> None:
    """`systemctl start` returns when a client can generate; what waits for the instance gets it."""
    online = demo.start()
    assert generate(tiny_path, maddr_of(online)) == greedy(tiny, PROMPT, 8)
    lab.systemctl("start", "petalsd-wait-online@demo.service")
    assert active(lab) == {"petalsd.target", demo.unit, "petalsd-wait-online@demo.service"}
    lab.systemctl("reload", demo.unit)
    assert lab.run(["petalsctl", "status"], user="petalsd").stdout.startswith("● demo is online")


def test_an_upgrade_goes_through_a_drain(
    lab: Lab, demo: Instance, instance: MakeInstance, tiny: PreTrainedModel, tiny_path: Path, figure: Figure
) -> None:
    """A generation in the middle ends token-exact before any file changes; then what ran runs again, enabled
    or not, and nothing else.
    """
    by_hand, idle = instance("by-hand"), instance("idle")
    for other in (by_hand, idle):
        other.configure(MODEL)
    lab.systemctl("enable", idle.unit)
    by_hand.start()
    old = field(built_package(), "Version").partition("+")[0]
    maddr = str(demo.ctl("status")["maddrs"][0])
    with connect(tiny_path, maddr) as client, ThreadPoolExecutor(1) as pool:
        generation = Generation(pool, client, PROMPT, 24, hold_at=4)
        generation.wait_held()
        since_s = demo.journal.mark()
        upgrade = lab.spawn(["dpkg", "--install", f"{PACKAGES}/new.deb"])
        demo.event("drain_started", since_s)
        assert lab.run(["petalsctl", "--version"]).stdout == f"petalsctl {old}\n"
        generation.release()
        assert generation.tokens() == greedy(tiny, PROMPT, 24)
        output, errors = upgrade.communicate(timeout=120)
    assert upgrade.returncode == 0, output + errors
    figure("upgrade with a session in the middle", time.monotonic() - since_s)
    assert demo.event("drained", since_s)["abandoned"] == "0"
    for running in (demo, by_hand):
        lab.run(["petalsctl", "-i", running.name, "wait", "--ready", "--timeout", "60"], timeout_s=70)
        assert running.ctl("status")["version"] == NEXT_VERSION
    assert idle.show("ActiveState") == "inactive"
    assert generate(tiny_path, str(demo.ctl("status")["maddrs"][0])) == greedy(tiny, PROMPT, 8)
    assert re.search(r"petalsd: starting again .*petalsd@demo\.service", errors)


def test_removal_keeps_what_is_the_administrators_and_purge_nothing(lab: Lab, demo: Instance) -> None:
    """Instances drain and stop before their files go."""
    since_s = demo.journal.mark()
    lab.run(["dpkg", "--remove", "petalsd"], timeout_s=120)
    demo.event("stopped", since_s)
    assert active(lab) == set()
    kept = ["/etc/petalsd/demo.toml", "/var/lib/petalsd/demo/identity.key", "/var/cache/petalsd"]
    gone = [
        "/usr/lib/petalsd",
        "/usr/bin/petalsd",
        "/lib/systemd/system/petalsd@.service",
        "/run/petalsd.stopped",
    ]
    assert [path for path in kept if not exists(lab, path)] == []
    assert [path for path in gone if exists(lab, path)] == []
    lab.run(["dpkg", "--purge", "petalsd"], timeout_s=120)
    left = ["/etc/petalsd", "/var/lib/petalsd", "/var/cache/petalsd", "/run/petalsd",
            "/etc/systemd/system/petalsd.target.wants",
            "/etc/systemd/system/multi-user.target.wants/petalsd.target"]  # fmt: skip
    assert [path for path in left if exists(lab, path)] == []
