"""``petalsctl doctor``: what it finds on this machine and in an instance, with and without the daemon."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from petalsd.cli.petalsctl import machine_checks
from petalsd.cli.petalsctl.findings import Finding, run_checks
from petalsd.cli.petalsctl.instances import System
from tests.cli.petalsctl.conftest import Ctl, Start
from tests.cli.petalsctl.documents import BOOTSTRAP_STATUS, STATUS, document
from tests.cli.petalsctl.fake_daemon import FakeDaemon
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_tiny("llama", path)
    return path


@pytest.fixture
def port() -> Iterator[int]:
    """A port of loopback that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def configure(system: System, model_dir: Path, **swarm: object) -> Path:
    """The file of the service ``demo``."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in swarm.items()]
    file = system.config_dir / "demo.toml"
    file.parent.mkdir(exist_ok=True)
    text = f'[model]\nsource = "{model_dir}"\n[engine]\ndevice = "cpu"\n[swarm]\n' + "\n".join(lines) + "\n"
    file.write_text(text)
    return file


def findings(ctl: Ctl, *words: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit status, and the findings by name; of several with one name the worst."""
    status, out, _ = ctl(*words, "doctor", "--json")
    found: dict[str, dict[str, str]] = {}
    for item in json.loads(out)["findings"]:
        known = found.get(item["name"])
        if known is None or ("ok", "warn", "fail").index(item["level"]) > ("ok", "warn", "fail").index(
            known["level"]
        ):
            found[item["name"]] = item
    return status, found


def test_a_good_instance_without_its_daemon(system: System, model_dir: Path, ctl: Ctl) -> None:
    """Machine and configuration are looked at; that the daemon is not running is said, with the command."""
    configure(system, model_dir, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    status, found = findings(ctl)
    assert status == 0, found
    for name in (
        "Python",
        "torch",
        "hivemind",
        "p2pd",
        "configuration",
        "model",
        "memory",
        "disk",
        "p2p port",
    ):
        assert found[name]["level"] == "ok", found[name]
    assert {"clock", "CUDA", "Triton", "GPU driver", "reachability"} <= set(found)
    assert found["daemon"]["level"] == "warn"
    assert "sudo systemctl start petalsd@demo" in found["daemon"]["fix"]
    assert "state directory" not in found  # the service's own: nothing that another user could judge


def test_what_would_keep_it_from_serving(system: System, model_dir: Path, port: int, ctl: Ctl) -> None:
    """A port that another program has, and peers that do not answer: exit 4, each with its fix."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = closed.getsockname()[1]
    peer = STATUS["peer_id"]
    configure(
        system, model_dir, host_maddrs=[f"/ip4/127.0.0.1/tcp/{port}"],
        initial_peers=[f"/ip4/127.0.0.1/tcp/{nobody}/p2p/{peer}"],
    )  # fmt: skip
    status, found = findings(ctl, "-i", "demo")
    assert status == 4
    assert found["p2p port"]["text"] == f"127.0.0.1:{port} is taken"
    assert f"sport = :{port}" in found["p2p port"]["fix"]
    assert found["initial peers"]["level"] == "fail"
    assert f"127.0.0.1:{nobody}: Connection refused" in found["initial peers"]["text"]


def test_one_peer_is_enough(system: System, model_dir: Path, port: int, ctl: Ctl) -> None:
    """A dead one beside it is a warning."""
    peer = STATUS["peer_id"]
    peers = [f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer}", f"/ip4/127.0.0.1/tcp/1/p2p/{peer}"]
    configure(system, model_dir, initial_peers=peers, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    status, found = findings(ctl)
    assert status == 0
    assert found["initial peers"]["text"].startswith("1 of 2 answer; 127.0.0.1:1: ")


def test_a_wrong_configuration(system: System, model_dir: Path, ctl: Ctl) -> None:
    """The text of the daemon's own loader, and which file to edit; the rest cannot be looked at."""
    file = configure(system, model_dir)
    file.write_text(file.read_text() + "[blocks]\ncuont = 3\n")
    status, found = findings(ctl)
    assert status == 4
    assert "did you mean blocks.count?" in found["configuration"]["text"]
    assert found["configuration"]["fix"] == f"edit {file}"
    assert "model" not in found
    shown = ctl("doctor")[1]
    assert f"cannot be used:\n{'':24}{file}: unknown key blocks.cuont" in shown


def test_a_running_daemon_is_asked(
    daemon: FakeDaemon, system: System, model_dir: Path, port: int, ctl: Ctl
) -> None:
    """Its port is its own, its blocks have their memory, and its warnings are findings."""
    configure(system, model_dir, host_maddrs=[f"/ip4/127.0.0.1/tcp/{port}"])
    warning = {
        "code": "record_missing",
        "title": "Not listed",
        "severity": "warning",
        "since_s": 1.0,
        "hint": "wait",
    }
    daemon.answers["GET /v1/status"] = document(
        STATUS,
        maddrs=[f"/ip4/127.0.0.1/tcp/{port}/p2p/{STATUS['peer_id']}"],
        warnings=[warning],
        is_relayed=True,
    )
    status, found = findings(ctl, "--socket", str(daemon.path))
    assert status == 0, found
    assert found["p2p port"] == finding("p2p port", "ok", f"127.0.0.1:{port} is the daemon's")
    assert found["memory"] == finding("memory", "ok", "blocks 0:15 are loaded")
    assert found["record_missing"] == finding("record_missing", "warn", "Not listed", "wait")
    assert found["reachability"]["level"] == "warn"


def test_a_daemon_that_announces_another_port_has_its_own(
    daemon: FakeDaemon, system: System, model_dir: Path, port: int, ctl: Ctl
) -> None:
    """A router forwards a port to it: what it tells others says nothing of where it listens."""
    file = configure(system, model_dir, host_maddrs=[f"/ip4/127.0.0.1/tcp/{port}"])
    outside = "/ip4/192.0.2.7/tcp/4001"
    file.write_text(file.read_text().replace("[swarm]", f'[swarm]\nannounce_maddrs = ["{outside}"]'))
    daemon.answers["GET /v1/status"] = document(STATUS, maddrs=[f"{outside}/p2p/{STATUS['peer_id']}"])
    status, found = findings(ctl)
    assert status == 0, found
    assert found["p2p port"]["text"] == f"127.0.0.1:{port} is taken: by the daemon, which announces others"
    daemon.answers["GET /v1/status"] = document(STATUS, maddrs=[], peer_id=None)
    assert findings(ctl)[1]["p2p port"]["level"] == "fail"  # it has not joined: nothing of it listens


def test_without_an_instance_the_machine_is_looked_at(system: System, ctl: Ctl) -> None:
    """Readable without --json: a line per finding, fixes below, a verdict at the end."""
    status, out, _ = ctl("doctor")
    assert status == 0
    assert "\nok    torch " in out
    assert "\nwarn  instance          which one is meant is not known\n" in out
    assert "                        → petalsctl -i NAME doctor " in out
    assert out.splitlines()[-1].endswith("nothing that keeps petalsd from serving")


def test_of_several_none_is_looked_at(system: System, start_daemon: Start, ctl: Ctl) -> None:
    """What was found on the machine is said all the same, also to programs."""
    for name in "ab":
        start_daemon(system.run_dir / name / "control.sock")
    status, found = findings(ctl)
    assert status == 0
    assert found["torch"]["level"] == "ok"
    assert found["instance"]["text"] == "which one is meant is not known"
    assert ctl("-i", "not/a/name", "doctor")[0] == 3


def test_a_name_that_is_unknown(system: System, model_dir: Path, ctl: Ctl) -> None:
    """The only instance there is is not taken for the one that was named."""
    configure(system, model_dir)
    status, found = findings(ctl, "-i", "dmeo")
    assert status == 4
    assert found["instance"]["level"] == "fail"
    assert "there is no instance dmeo" in found["instance"]["text"]
    assert "configuration" not in found


def test_a_check_that_breaks_is_a_finding() -> None:
    """One surprise must not hide what the others found."""

    def broken() -> Finding:
        raise RuntimeError("surprise")

    found = list(run_checks([("a", broken), ("b", lambda: Finding("b", "ok", "fine"))]))
    assert found == [
        Finding("a", "fail", "could not be looked at: RuntimeError: surprise"), Finding("b", "ok", "fine")
    ]  # fmt: skip


@pytest.mark.parametrize(("status", "level"), [(0x0001, "ok"), (0x0041, "warn"), (None, "warn")])
def test_the_clock(status: int | None, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel says: STA_UNSYNC, or not known."""
    monkeypatch.setattr(machine_checks, "_kernel_clock_status", lambda: status)
    assert machine_checks.check_clock().level == level


def test_a_driver_without_its_device_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The version of the loaded module, and whether this user may open the card."""
    version = tmp_path / "version"
    version.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 2025\nGCC version:\n"
    )
    device = tmp_path / "nvidiactl"
    monkeypatch.setattr(machine_checks, "NVIDIA_DRIVER", version)
    monkeypatch.setattr(machine_checks, "_NVIDIA_DEVICE", device)
    found = machine_checks.check_driver()
    assert (found.level, found.text) == ("fail", f"NVIDIA 580.95.05, but {device} cannot be opened")
    device.touch()
    assert machine_checks.check_driver() == Finding("GPU driver", "ok", "NVIDIA 580.95.05")


def finding(name: str, level: str, text: str, fix: str = "") -> dict[str, str]:
    return {"name": name, "level": level, "text": text, "fix": fix}


@pytest.mark.parametrize(("is_reachable", "level"), [(True, "ok"), (None, "ok"), (False, "fail")])
def test_a_bootstrap_node(
    is_reachable: bool | None, level: str, daemon: FakeDaemon, system: System, ctl: Ctl
) -> None:
    """Nothing of a model is looked at; it is there without others, but not without a port that they reach."""
    others = f'initial_peers = ["/ip4/127.0.0.1/tcp/1/p2p/{STATUS["peer_id"]}"]'
    text = f'[daemon]\nrole = "bootstrap"\n[swarm]\nhost_maddrs = ["/ip4/127.0.0.1/tcp/0"]\n{others}\n'
    system.config_dir.mkdir()
    (system.config_dir / "demo.toml").write_text(text)
    daemon.answers["GET /v1/status"] = {**BOOTSTRAP_STATUS, "instance": "demo", "is_reachable": is_reachable}
    status, found = findings(ctl)
    assert status == (0 if level == "ok" else 4), found
    assert found["reachability"]["level"] == level
    assert found["initial peers"]["level"] == "warn"
    assert found["configuration"]["level"] == "ok"
    assert not {"model", "memory", "weights"} & set(found)
