"""That the ports of ``swarm.host_maddrs`` are nobody else's.

libp2p listens with SO_REUSEPORT: two daemons of one user may have the same port, neither is told, and the kernel
gives each some of the connections, which then find a peer that they did not look for.
"""

from __future__ import annotations

import contextlib
import errno
import re
import socket
from collections.abc import Iterator, Sequence

from petalsd.errors import SwarmError

TAKEN_HINT = "`ss -ltnup` shows who listens there; end that, or change swarm.host_maddrs"

_TCP = re.compile(r"/(ip4|ip6)/([^/]+)/tcp/(\d+)")
_FAMILIES = {"ip4": socket.AF_INET, "ip6": socket.AF_INET6}


@contextlib.contextmanager
def claimed_ports(maddrs: Sequence[str]) -> Iterator[None]:
    """SwarmError where somebody listens already; so long nobody else who asks here gets the same ports.

    The libp2p daemon of this user may listen meanwhile.
    """
    with contextlib.ExitStack() as sockets:
        claims = []
        for maddr in maddrs:
            if (found := _TCP.match(maddr)) is None or found[3] == "0":
                continue
            with contextlib.suppress(OSError):  # the libp2p daemon says what is wrong, or does without IPv6
                claim = sockets.enter_context(socket.socket(_FAMILIES[found[1]], socket.SOCK_STREAM))
                _bind(claim, found[2], int(found[3]), maddr)
                claims.append(claim)
        for claim in claims:  # only now: addresses of one list may overlap
            claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        yield


def _bind(claim: socket.socket, host: str, port: int, maddr: str) -> None:
    """Connections of a daemon that has ended do not count; listeners and other claims do."""
    claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if claim.family == socket.AF_INET6:
        claim.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    try:
        claim.bind((host, port))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise SwarmError(f"cannot listen on {maddr}: address already in use", hint=TAKEN_HINT) from error
