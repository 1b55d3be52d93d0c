"""The facts of the Petals wire: names, states, sizes, block uids. No I/O, no hivemind."""

from __future__ import annotations

import enum

from petalsd.errors import BadRequest
from petalsd.types import BlockSpan

# libp2p protocol ids are "<service>.<method>"; stock clients dial exactly these.
SERVICE = "TransformerConnectionHandler"
HAND_OVER_SERVICE = "PetalsdHandOver"  # between servers of petalsd
HAND_OVER_METHOD = "rpc_take"
REACHABILITY_SERVICE = "ReachabilityProtocol"
UNARY_METHODS = ("rpc_info", "rpc_forward", "rpc_backward", "rpc_push")
STREAM_METHODS = ("rpc_forward_stream", "rpc_backward_stream", "rpc_inference")

MODELS_KEY = "_petals.models"
UID_DELIMITER = "."
CHAIN_DELIMITER = " "
PRIVATE_PREFIX = "_"

MIB = 1024 * 1024
MAX_UNARY_BYTES = 4 * MIB  # p2pd's limit for one unary message, envelope included
UNARY_ENVELOPE_BYTES = 4096  # what peer id, protocol id, uid framing and call id may take of it
MAX_TENSORS = 64  # in one message, and in one request of several
MAX_PART_BYTES = 4 * MIB  # one part of a tensor in a *_stream call
STREAM_ABOVE_BYTES = MIB  # a client sends larger input through the *_stream call
MAX_METADATA_BYTES = 256 * 1024
MAX_UID_CHARS = 64 * 1024  # of a chain: as many blocks with long names
MAX_MODEL_BLOCKS = 1024  # of any model, and so of a chain: each costs time

PUBLIC_INITIAL_PEERS = (
    "/dns/bootstrap1.petals.dev/tcp/31337/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY",
    "/dns/bootstrap2.petals.dev/tcp/31338/p2p/QmQGTqmM7NKjV6ggU1ZCap8zWiyKR89RViDXiqehSiCpY5",
    "/dns6/bootstrap1.petals.dev/tcp/31337/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY",
    "/dns6/bootstrap2.petals.dev/tcp/31338/p2p/QmQGTqmM7NKjV6ggU1ZCap8zWiyKR89RViDXiqehSiCpY5",
    "/ip4/159.89.214.152/tcp/31337/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY",
    "/ip4/159.203.156.48/tcp/31338/p2p/QmQGTqmM7NKjV6ggU1ZCap8zWiyKR89RViDXiqehSiCpY5",
)


class ServerState(enum.IntEnum):
    """What a server says about its blocks. Clients use ONLINE only; placement counts JOINING too."""

    OFFLINE = 0
    JOINING = 1
    ONLINE = 2


def handle_name(method: str, service: str = SERVICE) -> str:
    """``rpc_info`` -> ``TransformerConnectionHandler.rpc_info``."""
    return f"{service}.{method}"


def make_uid(prefix: str, block: int) -> str:
    return f"{prefix}{UID_DELIMITER}{block}"


def parse_uid(uid: str) -> tuple[str, int]:
    """``"Llama-hf.3"`` -> ``("Llama-hf", 3)``; BadRequest when it is not one prefix and one block number."""
    prefix, delimiter, index = uid.partition(UID_DELIMITER)
    if not (prefix and delimiter and index.isascii() and index.isdigit() and len(index) <= 9):
        raise BadRequest("uid", uid, "a block is named <prefix>.<number>")
    return prefix, int(index)


def make_chain(prefix: str, span: BlockSpan) -> str:
    """The uid field of a request for all blocks of ``span``, in order."""
    return CHAIN_DELIMITER.join(make_uid(prefix, block) for block in span)


def parse_span(text: str) -> tuple[str, BlockSpan]:
    """Split a chained uid; BadRequest unless its blocks are of one model, consecutive and ascending."""
    if len(text) > MAX_UID_CHARS:
        raise BadRequest("uid", text, f"at most {MAX_UID_CHARS} characters")
    if text.count(CHAIN_DELIMITER) >= MAX_MODEL_BLOCKS:
        raise BadRequest("uid", text, f"at most {MAX_MODEL_BLOCKS} blocks")
    pairs = [parse_uid(uid) for uid in text.split(CHAIN_DELIMITER)]
    prefixes = {prefix for prefix, _ in pairs}
    if len(prefixes) != 1:
        raise BadRequest("uid", text, "all blocks of a request belong to one model")
    blocks = [block for _, block in pairs]
    if blocks != list(range(blocks[0], blocks[0] + len(blocks))):
        raise BadRequest("uid", text, "blocks must be consecutive and ascending")
    return pairs[0][0], BlockSpan(blocks[0], blocks[-1] + 1)


def announced_throughput(
    forward_rps: float, network_rps: float, num_blocks: int, *, is_relayed: bool
) -> float:
    """Requests' tokens/s of a span, as the swarm compares servers (protocol.md 6.4).

    A request enters at a random block of the span, so it uses (n+1)/2 blocks on average; relays are slow.
    """
    return min(forward_rps / ((num_blocks + 1) / 2), network_rps * (0.2 if is_relayed else 1.0))
