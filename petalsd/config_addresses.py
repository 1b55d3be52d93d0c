"""The form of libp2p multiaddrs, checked before anything is started: text only, nothing is resolved."""

from __future__ import annotations

import ipaddress
import re

import base58

_PEER_ID = re.compile(r"[1-9A-HJ-NP-Za-km-z]{32,64}")
# A PeerID is a multihash: a code, the length of what follows, and that. These are the codes of the public key
# itself, as of ed25519, and of its SHA-256.
_MULTIHASH_CODES = (0x00, 0x12)
_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_BARE = frozenset({"quic", "quic-v1", "ws", "wss", "tls", "p2p-circuit"})
_VALUED = frozenset({"ip4", "ip6", "dns", "dns4", "dns6", "dnsaddr", "tcp", "udp", "p2p", "ipfs"})


def check_maddr(text: object, *, needs_peer: bool) -> None:
    """ValueError says what is wrong with ``/ip4/10.0.0.7/tcp/31337/p2p/Qm...``.

    An address of another peer (needs_peer) ends in ``/p2p/PeerID``; one to listen on has no peer.
    """
    if not isinstance(text, str) or not text.startswith("/"):
        raise ValueError(f"a multiaddr is text as in /ip4/10.0.0.7/tcp/31337, got {text!r}")
    protocols = _walk(text)
    if protocols[0] not in {"ip4", "ip6", "dns", "dns4", "dns6", "dnsaddr"}:
        raise ValueError(f"{text}: a multiaddr begins with ip4, ip6 or dns")
    if protocols[0] != "dnsaddr" and protocols[1:2] not in (["tcp"], ["udp"]):  # dnsaddr is whole addresses
        raise ValueError(f"{text}: a host is followed by its port, as in /tcp/31337")
    if needs_peer and "p2p" not in protocols:
        raise ValueError(f"{text}: an initial peer ends in /p2p/ and its PeerID")


def check_peer_id(text: object) -> None:
    """ValueError unless it is a base58 PeerID, ``Qm...`` or ``12D3Koo...``, with all its characters."""
    if not isinstance(text, str) or not _PEER_ID.fullmatch(text):
        raise ValueError(f"{text!r} is no PeerID")
    code, length, *digest = base58.b58decode(text)
    if code not in _MULTIHASH_CODES or length != len(digest):
        raise ValueError(f"{text!r} is no PeerID: characters of it are missing, added or wrong")


def _walk(text: str) -> list[str]:
    """The protocol names in order; each value is checked on the way."""
    parts = text[1:].split("/")
    protocols: list[str] = []
    while parts:
        protocol = parts.pop(0)
        if protocol in _VALUED:
            if not parts:
                raise ValueError(f"{text}: /{protocol} has no value")
            _check_value(text, protocol, parts.pop(0))
        elif protocol not in _BARE:
            raise ValueError(f"{text}: unknown protocol {protocol!r}")
        protocols.append("p2p" if protocol == "ipfs" else protocol)
    return protocols


def _check_value(text: str, protocol: str, value: str) -> None:
    if protocol in {"ip4", "ip6"}:
        kind = ipaddress.IPv4Address if protocol == "ip4" else ipaddress.IPv6Address
        try:
            kind(value)
        except ValueError:
            raise ValueError(f"{text}: {value!r} is no {protocol} address") from None
    elif protocol in {"tcp", "udp"}:
        if not value.isdecimal() or int(value) > 65535:
            raise ValueError(f"{text}: {value!r} is no port")
    elif protocol in {"p2p", "ipfs"}:
        try:
            check_peer_id(value)
        except ValueError as error:
            raise ValueError(f"{text}: {error}") from None
    elif not _HOST_NAME.fullmatch(value):
        raise ValueError(f"{text}: {value!r} is no host name")
