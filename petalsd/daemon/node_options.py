"""The section [swarm] as the options of a node."""

from __future__ import annotations

import ipaddress

from petalsd.config import SwarmSection
from petalsd.paths import InstancePaths
from petalsd.swarm.node import NodeOptions
from petalsd.swarm.protocol import PUBLIC_INITIAL_PEERS


def node_options(section: SwarmSection, paths: InstancePaths, num_blocks: int) -> NodeOptions:
    """``num_blocks`` lookups run at once: one for each block's record."""
    peers = section.initial_peers
    return NodeOptions(
        initial_peers=PUBLIC_INITIAL_PEERS if isinstance(peers, str) else peers,
        host_maddrs=section.host_maddrs,
        announce_maddrs=section.announce_maddrs,
        identity_path=section.identity_path or paths.identity_file,
        use_relay=section.relay,
        use_auto_relay=section.relay and not _is_loopback_only(section.host_maddrs),
        num_workers=num_blocks,
    )


def _is_loopback_only(maddrs: tuple[str, ...]) -> bool:
    """Whether all of ``/ip4/127.0.0.1/tcp/0`` and the like stay on this machine."""
    hosts = [maddr.split("/")[1:3] for maddr in maddrs]
    return all(kind in ("ip4", "ip6") and ipaddress.ip_address(host).is_loopback for kind, host in hosts)
