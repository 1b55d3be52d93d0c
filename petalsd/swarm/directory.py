"""Who serves what: the records of a model's blocks, read from the DHT and put together into spans."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import structlog

from petalsd.swarm.node import DHTEntry, Node
from petalsd.swarm.off_loop import off_loop
from petalsd.swarm.protocol import ServerState, make_uid
from petalsd.swarm.record import ServerRecord
from petalsd.types import BlockSpan

log = structlog.get_logger(__name__)

READ_TIMEOUT_S = 30.0
_ENTRY_BYTES = 8192  # what one counts for ``off_loop``: 128 take 4 ms to parse


@dataclass(frozen=True, slots=True)
class RemoteSpan:
    """The blocks that one server serves, as far as its records tell. ``peer`` is its base58 PeerID."""

    peer: str
    span: BlockSpan
    record: ServerRecord

    @property
    def state(self) -> ServerState:
        return self.record.state


@dataclass(frozen=True, slots=True)
class SwarmView:
    """One reading of the directory: for each block, the servers that have an entry there.

    ``ghosts``: who of them is thought to have gone without a goodbye.
    """

    prefix: str
    num_blocks: int
    blocks: Sequence[Mapping[str, ServerRecord]]
    ghosts: frozenset[str] = frozenset()

    def spans(self, min_state: ServerState = ServerState.ONLINE) -> list[RemoteSpan]:
        """Each server's span at ``min_state`` or better, in order of PeerID (protocol.md 2.5).

        A server's claimed ends win over the blocks it is listed under; of records in different states the
        better one counts.
        """
        spans: dict[str, RemoteSpan] = {}
        for block, records in enumerate(self.blocks):
            for peer in sorted(records):
                record = records[peer]
                if record.state < min_state:
                    continue
                known = spans.get(peer)
                if known is None or record.state > known.state:
                    spans[peer] = RemoteSpan(peer, _claimed(record, block, self.num_blocks), record)
                elif record.state == known.state and known.span.end <= block:
                    spans[peer] = replace(known, span=BlockSpan(known.span.start, block + 1))
        return [spans[peer] for peer in sorted(spans)]

    def without_ghosts(self) -> SwarmView:
        """What is there to build on: the view of servers that are thought to live."""
        return self.without(self.ghosts) if self.ghosts else self

    def without(self, peers: Collection[str]) -> SwarmView:
        """The same view with some servers left out."""
        blocks = [
            {peer: record for peer, record in records.items() if peer not in peers} for records in self.blocks
        ]
        return replace(self, blocks=blocks)

    def missing_blocks(self) -> list[int]:
        """Blocks inside no ONLINE server's span."""
        covered = {block for remote in self.spans() for block in remote.span}
        return [block for block in range(self.num_blocks) if block not in covered]


async def read_view(node: Node, prefix: str, num_blocks: int, timeout_s: float = READ_TIMEOUT_S) -> SwarmView:
    """Read all blocks' latest records. A bad entry is left out; DeadlineExceeded when the DHT does not answer."""
    (view,) = await read_views(node, {prefix: num_blocks}, timeout_s)
    return view


async def read_views(
    node: Node, num_blocks: Mapping[str, int], timeout_s: float = READ_TIMEOUT_S
) -> list[SwarmView]:
    """As ``read_view``, of several models in one reading; ``num_blocks`` by prefix."""
    uids = {prefix: [make_uid(prefix, block) for block in range(num)] for prefix, num in num_blocks.items()}
    found = await node.get([uid for group in uids.values() for uid in group], timeout_s)

    def put_together() -> list[SwarmView]:
        return [
            SwarmView(prefix, len(group), [parse_entries(uid, found[uid]) for uid in group])
            for prefix, group in uids.items()
        ]

    return await off_loop(_ENTRY_BYTES * sum(map(len, found.values())), put_together)


def parse_entries(uid: str, entries: Mapping[object, DHTEntry]) -> dict[str, ServerRecord]:
    """The usable records under one block; anyone may have written the others."""
    records: dict[str, ServerRecord] = {}
    for peer, entry in entries.items():
        try:
            if not isinstance(peer, str) or not _is_peer_id(peer):
                raise ValueError("the subkey is not a PeerID")
            records[peer] = ServerRecord.from_wire(entry.value, entry.expiration)
        except Exception as error:  # one hostile entry must not hide the others
            log.debug("bad_record", uid=uid, peer=repr(peer)[:80], error=str(error)[:200])
    return records


def _claimed(record: ServerRecord, block: int, num_blocks: int) -> BlockSpan:
    whole = BlockSpan(0, num_blocks)
    claim = record.span.intersect(whole) if record.span is not None else None
    return claim or BlockSpan(block, block + 1)


def _is_peer_id(text: str) -> bool:
    return 32 <= len(text) <= 64 and text.isascii() and text.isalnum()
