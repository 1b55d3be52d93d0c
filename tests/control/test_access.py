"""Who may act: root, the daemon's own user, the members of the group; and nobody else."""

from __future__ import annotations

import grp
import os
import socket

import pytest

from petalsd.control.access import Access, Peer
from petalsd.errors import ConfigError


def test_the_kernel_says_who_connected() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        peer = Peer.of(ours)
    assert (peer.pid, peer.uid) == (os.getpid(), os.geteuid())
    assert peer.groups == {os.getegid(), *os.getgroups()}


@pytest.mark.parametrize(
    ("peer", "may_act"),
    [
        (Peer(1, 0, frozenset({0})), True),
        (Peer(1, 990, frozenset({990})), True),
        (Peer(1, 1000, frozenset({1000, 77})), True),
        (Peer(1, 1000, frozenset({1000})), False),
        (Peer(1, 65534, frozenset({65534})), False),
    ],
)
def test_who_may_act(peer: Peer, may_act: bool) -> None:
    assert Access(own_uid=990, group="operators", gid=77).may_act(peer) is may_act


def test_without_a_group_only_root_and_the_daemon_itself() -> None:
    access = Access(own_uid=990, group=None, gid=None)
    assert not access.may_act(Peer(1, 1000, frozenset({1000, 77})))
    assert access.may_act(Peer(1, 990, frozenset()))
    assert "group" not in access.actors


def test_a_group_that_was_named_must_exist() -> None:
    with pytest.raises(ConfigError, match=r"control.group = 'no-such-group': there is no such group"):
        Access.of("no-such-group")
    own = grp.getgrgid(os.getegid()).gr_name
    assert Access.of(own) == Access(os.geteuid(), own, os.getegid())


def test_the_default_group_need_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> object:
        raise KeyError(name)

    monkeypatch.setattr(grp, "getgrnam", unknown)
    assert Access.of(None) == Access(os.geteuid(), None, None)
