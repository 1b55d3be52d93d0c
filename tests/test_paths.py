"""Directories of an instance, under systemd and outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from petalsd.errors import ConfigError
from petalsd.paths import config_file_of, control_socket_of, instance_paths


def test_systemd_directories_win() -> None:
    """Under systemd the unit's directories are used as they stand, the first of several."""
    environ = {"STATE_DIRECTORY": "/var/lib/petalsd/a:/other", "CACHE_DIRECTORY": "/var/cache/petalsd",
               "XDG_STATE_HOME": "/x", "HOME": "/home/u"}  # fmt: skip
    paths = instance_paths("a", environ)
    assert paths.identity_file == Path("/var/lib/petalsd/a/identity.key")
    assert paths.weights_dir == Path("/var/cache/petalsd/weights")
    assert paths.credentials_dir is None
    environ["CREDENTIALS_DIRECTORY"] = "/run/credentials/petalsd@a.service"
    assert instance_paths("a", environ).credentials_dir == Path("/run/credentials/petalsd@a.service")


def test_a_user_whom_the_machine_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in containers with a user id of their own and an empty environment: not a traceback."""

    def nobody(path: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nobody)
    assert instance_paths("a", {}).state_dir == Path("/.local/state/petalsd/a")
    assert config_file_of("a", {}) == Path("/etc/petalsd/a.toml")


def test_outside_systemd_xdg_directories_are_used() -> None:
    """State is per instance, the cache is shared; relative XDG values are ignored as XDG demands."""
    paths = instance_paths(
        "a", {"HOME": "/home/u", "XDG_CACHE_HOME": "/caches", "XDG_STATE_HOME": "relative"}
    )
    assert paths.state_dir == Path("/home/u/.local/state/petalsd/a")
    assert paths.cache_dir == Path("/caches/petalsd")


def test_the_configuration_of_an_instance(tmp_path: Path) -> None:
    """The system's file is taken unless only the user has one of that name."""
    environ = {"CONFIGURATION_DIRECTORY": str(tmp_path / "etc"), "XDG_CONFIG_HOME": str(tmp_path / "own")}
    system, own = tmp_path / "etc" / "a.toml", tmp_path / "own" / "petalsd" / "a.toml"
    assert config_file_of("a", environ) == system
    own.parent.mkdir(parents=True)
    own.touch()
    assert config_file_of("a", environ) == own
    system.parent.mkdir()
    system.touch()
    assert config_file_of("a", environ) == system


@pytest.mark.parametrize("name", ["", "../etc", "a/b", ".hidden", "a b"])
def test_instance_names_cannot_leave_their_directory(name: str) -> None:
    """A name with a slash, a space or a leading dot is a configuration error."""
    with pytest.raises(ConfigError, match="use letters"):
        instance_paths(name, {"HOME": "/home/u"})


def test_the_control_socket_of_a_daemon() -> None:
    """systemd's runtime directory, else the user's, else the state directory."""
    service = {"RUNTIME_DIRECTORY": "/run/petalsd/a", "STATE_DIRECTORY": "/var/lib/petalsd/a"}
    assert instance_paths("a", service).control_socket == Path("/run/petalsd/a/control.sock")
    user = {"HOME": "/home/u", "XDG_RUNTIME_DIR": "/run/user/7"}
    assert instance_paths("a", user).control_socket == Path("/run/user/7/petalsd/a/control.sock")
    bare = {"HOME": "/home/u", "XDG_RUNTIME_DIR": "relative"}
    assert instance_paths("a", bare).control_socket == Path("/home/u/.local/state/petalsd/a/control.sock")


def test_the_service_is_found_before_the_users_own(tmp_path: Path) -> None:
    """A command finds the socket of the system's instance, and the user's where there is no such instance."""
    environ = {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path / "user")}
    service = tmp_path / "system" / "a" / "control.sock"
    own = tmp_path / "user" / "petalsd" / "a" / "control.sock"
    assert control_socket_of("a", environ, tmp_path / "system") == own
    service.parent.mkdir(parents=True)
    service.touch()
    assert control_socket_of("a", environ, tmp_path / "system") == service
