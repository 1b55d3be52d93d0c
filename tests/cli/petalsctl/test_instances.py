"""Which daemon is asked, and the sentence and the command when none can be."""

from __future__ import annotations

import getpass
import socket
from pathlib import Path

import pytest

from petalsd.cli.petalsctl.instances import Instance, System, _configured_socket, explain
from tests.cli.petalsctl.conftest import Ctl, Start
from tests.cli.petalsctl.documents import STATUS, document
from tests.cli.petalsctl.fake_daemon import HANG_UP, FakeDaemon, refusal


def serve(start: Start, path: Path, name: str) -> None:
    start(path).answers["GET /v1/status"] = document(STATUS, instance=name)


def test_the_only_one_needs_no_name(system: System, home: Path, start_daemon: Start, ctl: Ctl) -> None:
    """A service, or a daemon that this user started."""
    serve(start_daemon, home / "user" / "petalsd" / "mine" / "control.sock", "mine")
    assert "● mine is online" in ctl("status")[1]
    assert "● mine is online" in ctl("-i", "mine", "status")[1]


def test_several_must_be_told_apart(system: System, home: Path, start_daemon: Start, ctl: Ctl) -> None:
    """All are listed, services and one's own; exit 3. A name chooses, before the verb or behind it."""
    serve(start_daemon, system.run_dir / "b" / "control.sock", "b")
    serve(start_daemon, system.run_dir / "a" / "control.sock", "a")
    serve(start_daemon, home / ".local" / "state" / "petalsd" / "c" / "control.sock", "c")
    status, out, err = ctl("status")
    assert (status, out) == (3, "")
    assert err == "petalsctl: several instances are running: a, b, c\n  name one: petalsctl -i a …\n"
    for name in "abc":
        path = system.run_dir / name / "control.sock"
        if name == "c":
            path = home / ".local" / "state" / "petalsd" / name / "control.sock"
        assert f"● {name} is online" in ctl("--socket", str(path), "status")[1]
    assert "● b is online" in ctl("-i", "b", "status")[1]
    assert "● b is online" in ctl("status", "--instance", "b")[1]


def test_a_socket_without_a_daemon_does_not_count(
    system: System, home: Path, start_daemon: Start, ctl: Ctl
) -> None:
    """One that crashed leaves its socket; the one that runs is meant then."""
    serve(start_daemon, system.run_dir / "a" / "control.sock", "a")
    leave_stale_socket(home / "user" / "petalsd" / "old" / "control.sock")
    assert "● a is online" in ctl("status")[1]
    status, _, err = ctl("-i", "old", "status")
    assert status == 2
    assert "petalsd old is not running: nobody listens on" in err
    assert "petalsd run --instance old" in err


def test_a_service_that_is_not_running(system: System, ctl: Ctl) -> None:
    """The configured ones are known: the command that starts one is printed. Exit 2."""
    system.config_dir.mkdir()
    (system.config_dir / "demo.toml").touch()
    for words in (["status"], ["-i", "demo", "drain", "--wait"]):
        status, out, err = ctl(*words)
        assert (status, out) == (2, "")
        assert err == (
            "petalsctl: petalsd@demo is not running\n"
            "  sudo systemctl start petalsd@demo; journalctl -u petalsd@demo says why it ended\n"
        )
    (system.config_dir / "other.toml").touch()
    assert "no petalsd is running; configured are demo, other" in ctl("status")[2]


def test_an_own_instance_that_is_not_running(system: System, home: Path, ctl: Ctl) -> None:
    """As the README begins: a file in one's own configuration directory, and no service."""
    own = home / ".config" / "petalsd"
    own.mkdir(parents=True)
    (own / "mine.toml").touch()
    status, _, err = ctl("status")
    assert status == 2
    assert err == "petalsctl: petalsd mine is not running\n  petalsd run --instance mine\n"
    system.config_dir.mkdir()
    (system.config_dir / "demo.toml").touch()
    assert "no petalsd is running; configured are demo, mine" in ctl("status")[2]


def test_nothing_at_all(system: System, home: Path, ctl: Ctl) -> None:
    """A machine without an instance: how to make one."""
    status, _, err = ctl("status")
    assert status == 2
    assert f"none is configured in {system.config_dir} or {home}/.config/petalsd" in err
    assert "sudo systemctl start petalsd@NAME" in err


def test_an_instance_that_nobody_configured(system: System, start_daemon: Start, ctl: Ctl) -> None:
    """A slip of the finger: the instances that run are named."""
    serve(start_daemon, system.run_dir / "demo" / "control.sock", "demo")
    status, _, err = ctl("-i", "dmeo", "status")
    assert status == 2
    assert "there is no instance dmeo" in err
    assert "running: demo" in err


def test_a_configured_socket_is_found(system: System, home: Path, start_daemon: Start, ctl: Ctl) -> None:
    """control.socket in an instance's file moves the socket."""
    path = home / "elsewhere.sock"
    serve(start_daemon, path, "demo")
    system.config_dir.mkdir()
    (system.config_dir / "demo.toml").write_text(f'[control]\nsocket = "{path}"\n')
    assert ctl("status")[0] == 0
    assert ctl("-i", "demo", "status")[0] == 0


@pytest.mark.parametrize("written", ["{home}/elsewhere.sock", "~/elsewhere.sock"])
def test_a_configured_socket_of_an_own_instance_is_found(
    written: str, system: System, home: Path, start_daemon: Start, ctl: Ctl
) -> None:
    """The same for a file in the user's own directory, which may say ~ as the daemon understands it."""
    serve(start_daemon, home / "elsewhere.sock", "mine")
    file = home / ".config" / "petalsd" / "mine.toml"
    file.parent.mkdir(parents=True)
    file.write_text(f'[control]\nsocket = "{written.format(home=home)}"\n')
    assert ctl("status")[0] == 0
    assert ctl("-i", "mine", "status")[0] == 0


@pytest.mark.parametrize("number", ["9" * 5000, "[" * 5000], ids=["digits", "brackets"])
def test_a_file_that_cannot_be_read_moves_nothing(number: str, home: Path) -> None:
    file = home / "broken.toml"
    file.write_text(f"[control]\nsocket = {number}\n")
    assert _configured_socket(file) is None


def test_no_permission_says_how_to_get_it(home: Path) -> None:
    """The command again with sudo, or the group that the socket belongs to."""
    instance = Instance("demo", home / "control.sock", is_service=True)
    problem = explain(instance, PermissionError(13, "Permission denied"), ["status", "--watch"])
    assert problem.exit_code == 2
    assert problem.message == "this user may not talk to petalsd@demo"
    assert "sudo petalsctl status --watch" in problem.hint
    assert "sudo usermod -aG petalsd " in problem.hint


@pytest.mark.parametrize(
    ("more", "group"),
    [
        ({"acting_group": "wheel"}, "wheel"),
        ({"acting_group": "a b"}, "'a b'"),
        ({"acting_group": None}, None),
        ({"acting_group": ["wheel"]}, None),
        ({}, None),
    ],
)
def test_nobody_is_told_to_join_a_group_that_may_not_act(
    more: dict[str, object], group: str | None, daemon: FakeDaemon, ctl: Ctl
) -> None:
    """Without one that acts, the socket has the daemon's own: root's, if root started it.

    The sentence is for people: an older daemon, which has no field for the group, names none.
    """
    sentence = "/v1/drain: only for root and the daemon's own user, and the group petalsd"
    daemon.answers["POST /v1/drain"] = refusal(403, "forbidden", sentence, **more)
    advice = ctl("drain")[2].splitlines()[-1].strip()
    join = f"; or join its group: sudo usermod -aG {group} {getpass.getuser()}, then log in again"
    assert advice == "sudo petalsctl drain" + (join if group else "")


def test_no_group_opens_the_directory_of_a_user(home: Path) -> None:
    instance = Instance(None, home / "control.sock", is_service=False)
    problem = explain(instance, PermissionError(13, "Permission denied"), ["status"])
    assert problem.hint == "sudo petalsctl status"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (TimeoutError("timed out"), "petalsd@demo does not answer in time"),
        (BlockingIOError(11, "Resource temporarily unavailable"), "petalsd@demo does not answer in time"),
        (ConnectionResetError(104, "Connection reset by peer"), "petalsd@demo closed the connection"),
        (OSError("AF_UNIX path too long"), "petalsd@demo cannot be asked: AF_UNIX path too long"),
    ],
)
def test_other_silences(error: OSError, text: str, home: Path) -> None:
    """Where the daemon is there, its journal says more."""
    problem = explain(Instance("demo", home / "control.sock", is_service=True), error, [])
    assert problem.message.startswith(text)
    assert problem.hint == "journalctl -u petalsd@demo"


def test_a_daemon_that_hangs_up(daemon: FakeDaemon, ctl: Ctl) -> None:
    """A connection that ends without an answer is no traceback."""

    daemon.answers["GET /v1/status"] = HANG_UP
    status, _, err = ctl("status")
    assert status == 2
    assert "closed the connection" in err


def test_errors_are_documents_for_programs(system: System, ctl: Ctl) -> None:
    """With --json a program finds the error where it looks for the answer."""
    status, out, err = ctl("status", "--json")
    assert status == 2
    assert out.startswith('{"error": {"code": "no_answer", "message": "no petalsd is running')
    assert err


@pytest.mark.parametrize(
    "words",
    [["fly"], ["-i", "../x", "status"], ["status", "--interval", "-1"], ["rebalance", "--to", "5:5"],
     ["rebalance", "--dry-run", "--wait"], ["wait", "--ready", "--drained"],
     ["--inst", "demo", "status"], ["status", "--wat"], ["status", "--watch", "--interval", "1e10"]],
)  # fmt: skip
def test_bad_usage_exits_3(words: list[str], daemon: FakeDaemon, ctl: Ctl) -> None:
    """2 is taken: it says that the daemon does not answer."""
    status, out, err = ctl(*words)
    assert (status, out) == (3, "")
    assert "petalsctl" in err
    assert daemon.requests == []


def leave_stale_socket(path: Path) -> None:
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))
