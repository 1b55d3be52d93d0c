"""Who is at the other end of the socket, and what that user may do (unix(7), SO_PEERCRED)."""

from __future__ import annotations

import errno
import grp
import os
import socket
import struct
from dataclasses import dataclass

from petalsd.errors import ConfigError

DEFAULT_GROUP = "petalsd"
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
_SO_PEERGROUPS = 59  # of <asm-generic/socket.h>; Python has no name for it
_MAX_GROUPS_BYTES = 1024  # the most that Python's getsockopt takes


@dataclass(frozen=True, slots=True)
class Peer:
    """The process that connected, as the kernel saw it then."""

    pid: int
    uid: int
    groups: frozenset[int]

    @classmethod
    def of(cls, connection: socket.socket) -> Peer:
        """OSError when the connection is gone."""
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, gid = _CREDENTIALS.unpack(raw)
        return cls(pid, uid, frozenset((gid, *_supplementary_groups(connection))))


def _supplementary_groups(connection: socket.socket) -> tuple[int, ...]:
    """None of a process that is in more than 256 groups: it acts as root or not at all."""
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MAX_GROUPS_BYTES)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        return ()
    return struct.unpack(f"{len(raw) // 4}I", raw)


@dataclass(frozen=True, slots=True)
class Access:
    """Everyone who reaches the socket reads; root, the daemon's own user and the members of a group act."""

    own_uid: int
    group: str | None
    gid: int | None

    @classmethod
    def of(cls, group: str | None) -> Access:
        """``group`` as configured; unset, ``petalsd`` where there is one. ConfigError: there is no such group."""
        try:
            gid = grp.getgrnam(group or DEFAULT_GROUP).gr_gid
        except KeyError:
            if group is not None:
                raise ConfigError(
                    f"control.group = {group!r}: there is no such group",
                    hint=f"make it (groupadd --system {group}), or remove the key",
                ) from None
            return cls(os.geteuid(), None, None)
        return cls(os.geteuid(), group or DEFAULT_GROUP, gid)

    def may_act(self, peer: Peer) -> bool:
        return peer.uid in (0, self.own_uid) or (self.gid is not None and self.gid in peer.groups)

    @property
    def actors(self) -> str:
        """Who may act, in words."""
        return "root and the daemon's own user" + (f", and the group {self.group}" if self.group else "")
