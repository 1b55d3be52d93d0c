"""Listening on an address of the network, and what is wrong with one where that cannot be done."""

from __future__ import annotations

import asyncio
import errno
import os
import socket

from petalsd.control.connection import Server
from petalsd.errors import AddressUnavailable, ConfigError, PetalsdError
from petalsd.types import HostPort

_BACKLOG = 64


async def listen(server: Server, address: HostPort, setting: str) -> tuple[asyncio.Server, list[HostPort]]:
    """The listener, and the addresses that it has; ``setting`` is where the address comes from.

    AddressUnavailable when it cannot be had now, ConfigError when it never can.
    """
    loop = asyncio.get_running_loop()
    try:
        listener = await loop.create_server(
            server, address.host, address.port, backlog=_BACKLOG, reuse_address=True
        )
    except (OSError, UnicodeError) as error:
        raise _unavailable(address, error, setting) from error
    return listener, [_address_of(one) for one in listener.sockets]


def _unavailable(address: HostPort, error: OSError | UnicodeError, setting: str) -> PetalsdError:
    """A port may be free again, and an address come up, in a moment: the instance before this one is still ending,
    or a VPN starts.
    """
    number = error.errno if isinstance(error, OSError) else None
    # What asyncio raises for such an address from Python 3.12 on has no number.
    if number is None and isinstance(error, OSError):
        number = errno.EADDRNOTAVAIL
    what = f"{setting} = {str(address)!r}: "
    if number == errno.EADDRINUSE:
        shown = f"ss -ltnp sport = :{address.port}"
        hint = f"`{shown}` shows who listens there; end that, or name a free port"
        return AddressUnavailable(what + os.strerror(number), hint=hint)
    if number == errno.EADDRNOTAVAIL:
        hint = "name an address that this machine has: `ip address` shows them"
        return AddressUnavailable(what + os.strerror(number), hint=hint)
    return ConfigError(
        what + str(getattr(error, "strerror", None) or error),
        hint="name an address of this machine and a free port, for instance 127.0.0.1:9464",
    )


def _address_of(listener: socket.socket) -> HostPort:
    host, port, *_ = listener.getsockname()
    return HostPort(host, port)
