"""What the control socket says and takes, as documents: the one definition of their fields and units.

`petalsd/control/schemas` holds the JSON schemas that are made from these classes. Readers should ignore fields
that they do not know: later versions add some. A field that goes, or means something else, raises
``schema_version``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from petalsd.types import BlockSpan

SCHEMA_VERSION: Literal[1] = 1
MAX_DEADLINE_S = 30 * 86_400.0

State = Literal[
    "starting", "loading", "online", "rebalancing", "draining", "drained", "stopping", "stopped", "failed"
]
# Of another server, as its record says.
PeerState = Literal["offline", "joining", "online"]
Severity = Literal["critical", "warning", "info"]


class Document(BaseModel):
    """Frozen and complete: an answer has all its fields, with null for what is not known."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Answer(Document):
    schema_version: Literal[1] = SCHEMA_VERSION


class Span(Document):
    """Blocks ``start`` to ``end - 1``."""

    start: int
    end: int

    @classmethod
    def of(cls, span: BlockSpan) -> Span:
        return cls(start=span.start, end=span.end)


# Our own block; transformers' layer over packed weights; transformers' layer.
BlockPath = Literal["fused", "packed", "plain"]


class PathTrial(Document):
    """A way to compute blocks, compared at load time with transformers' layer in float32 on random input."""

    path: BlockPath
    kernels: str = Field(description="what computes decode steps")
    error: float | None = Field(
        description="the worst token's, relative to what a block adds; null where it was not finite"
    )
    tolerance: float = Field(description="by the dtype, and by what transformers' layer shows in it")
    is_passed: bool
    duration_s: float


class BlockKind(Document):
    """Blocks that differ in their weights alone; the last trial passed and is what serves."""

    kind: str
    trials: list[PathTrial]


class Model(Document):
    source: str = Field(description="Hub repository or directory")
    dht_prefix: str = Field(description="name of the model in the swarm")
    num_blocks: int
    family: str
    dtype: str
    quantization: str
    adapters: list[str] = Field(description="that clients may ask for by name")
    device: str
    path: BlockPath | None = Field(description="of the slowest kind; null until blocks are loaded")
    kernels: str | None = Field(description="that the path uses")
    block_kinds: list[BlockKind] = Field(description="that were loaded, and how each is computed")


class Loading(Document):
    """How far the blocks are: ``unit`` says what ``done`` and ``total`` count."""

    stage: Literal["fetching", "loading"]
    item: str | None = Field(description="file, or block")
    unit: Literal["bytes", "blocks"]
    done: int
    total: int
    percent: float


class SpillStatus(Document):
    """Idle sessions' part of the cache on the disk."""

    max_bytes: int
    file_bytes: int = Field(description="disk space taken")
    pages_promisable: int = Field(description="that sessions can be promised in all")
    pages_spilled: int = Field(description="hold tokens on the disk alone")


class PrefixStatus(Document):
    """Beginnings of prompts that are kept in host memory."""

    max_bytes: int
    bytes: int = Field(description="taken")
    tokens_seen: int = Field(description="that sessions began with since the start")
    tokens_reused: int = Field(description="of them, those that did not have to be computed")


class KVStatus(Document):
    pages_total: int
    pages_free: int = Field(description="hold no tokens")
    page_tokens: int
    tokens_left: int = Field(description="that a new session could reserve, summed over blocks")
    pages_reserved: int = Field(description="promised to open sessions, whether they hold tokens yet or not")
    spill: SpillStatus | None = Field(description="null where the cache of idle sessions stays in memory")
    prefixes: PrefixStatus | None = Field(description="null where every prompt is computed")


class GraphStatus(Document):
    """Decode steps of the served blocks as captured graphs."""

    captured: int = Field(description="graphs, over blocks and sizes of batches")
    wanted: int = Field(description="how many there are to be; until then the rest is launched")
    memory_bytes: int = Field(description="of the device, that they take")
    failure: str | None = Field(description="why the rest will not be captured")


class SessionCounts(Document):
    active: int
    limit: int = Field(description="rows that may be open at once")
    rows: int = Field(description="sequences: a session of batch size B has B")
    waiting: int = Field(description="sessions that wait for room in the cache")


# Where the announced rates come from: swarm.throughput, a measurement of a random block before any was loaded,
# one of the served blocks, or their clients' steps and passes.
RateSource = Literal["configured", "sample", "served", "live"]
# swarm.network_mbps, transfers between peers, or neither yet.
NetworkSource = Literal["configured", "measured", "assumed"]


class Throughput(Document):
    """Tokens/s as announced to the swarm; null where only ``tokens_per_s`` is configured."""

    tokens_per_s: float
    inference_rps: float | None = Field(description="through one block, one token at a time")
    forward_rps: float | None = Field(description="through one block, in passes of 1024 tokens")
    network_rps: float | None = Field(description="through the network link")
    source: RateSource = Field(description="of the rates through a block")
    network_source: NetworkSource | None


class LastMove(Document):
    from_: Span = Field(serialization_alias="from")
    to: Span
    at_unix_s: float
    reason: str


class Balance(Document):
    quality: float
    next_check_s: float | None
    last_move: LastMove | None
    is_pinned: bool = Field(description="never moves: its blocks are configured, or are all of the model")


class DrainStatus(Document):
    sessions_left: int
    deadline_left_s: float | None = Field(description="null once the drain is over")
    abandoned: int | None = Field(description="sessions that the deadline ended; null while draining")


class WatchdogStatus(Document):
    interval_s: float | None = Field(description="systemd's; null where nobody watches")
    last_ping_s: float | None
    engine_last_step_s: float | None


class ActiveWarning(Document):
    code: str
    title: str
    severity: Severity
    since_s: float
    hint: str


class Status(Answer):
    """GET /v1/status of a server"""

    role: Literal["server"] = "server"
    version: str
    instance: str
    state: State
    reason: str
    summary: str = Field(description="the line that systemctl status shows")
    since_s: float = Field(description="age of the state")
    uptime_s: float
    pid: int
    peer_id: str | None
    maddrs: list[str]
    is_relayed: bool
    model: Model
    span: Span | None
    served_span: Span | None = Field(description="blocks that the engine has; others may still be loaded")
    loading: Loading | None
    kv: KVStatus | None
    graphs: GraphStatus | None = Field(description="null where steps are not captured")
    sessions: SessionCounts
    throughput: Throughput | None
    balance: Balance
    drain: DrainStatus | None
    watchdog: WatchdogStatus
    warnings: list[ActiveWarning]


class SessionEntry(Document):
    id: str
    peer: str | None
    span: Span
    rows: int
    position: int = Field(description="tokens of each row")
    max_tokens: int
    age_s: float
    idle_s: float
    kv_pages: int


class Sessions(Answer):
    """GET /v1/sessions"""

    sessions: list[SessionEntry]


class PeerEntry(Document):
    peer_id: str
    state: PeerState
    span: Span
    throughput: float | None
    inference_rps: float | None = Field(description="tokens/s through one of its blocks, one at a time")
    forward_rps: float | None = Field(description="tokens/s through one of its blocks, in passes")
    network_rps: float | None = Field(description="tokens/s through its network link")
    cache_tokens_left: int | None = Field(description="keys and values that still fit, summed over blocks")
    public_name: str | None
    version: str | None
    is_relayed: bool
    ping_ms: float | None
    is_self: bool
    is_ghost: bool = Field(description="its record is there, but it went without a goodbye")


class Peers(Answer):
    """GET /v1/peers of a server"""

    peers: list[PeerEntry]
    uncovered: list[Span] = Field(description="blocks that no server serves; ghosts serve none")


class Version(Answer):
    """GET /v1/version"""

    version: str


class Gain(Document):
    """Throughput of the swarm's weakest block, tokens/s."""

    swarm_throughput_before: float
    swarm_throughput_after: float
    ratio: float | None = Field(description="null where nobody served that block before")
    tokens: float = Field(description="won over the time that a gain is expected to last")


class Cost(Document):
    blocks_to_load: int
    blocks_kept: int
    seconds_estimate: float | None
    tokens: float = Field(description="lost while the new blocks load")


class Turn(Document):
    """A server of the swarm that is to move first."""

    peer_id: str
    current: Span
    target: Span


class Plan(Answer):
    """POST /v1/rebalance: what is done, or would be (``dry_run``)"""

    current: Span
    proposed: Span | None
    gain: Gain | None
    cost: Cost | None
    weakest: list[Span] = Field(description="runs of blocks that the swarm serves worst")
    ahead: list[Turn] = Field(description="moves of others that come first, the most valuable first")
    sessions_touched: int = Field(description="sessions that the move ends")
    sessions_kept: int
    would_move: bool
    explanation: str


class Reloaded(Answer):
    """POST /v1/reload"""

    applied: list[str] = Field(description="keys whose new value is in force")
    needs_restart: list[str] = Field(description="keys whose new value waits for a restart")


class ErrorText(Document):
    code: str
    message: str
    hint: str
    acting_group: str | None = Field(
        default=None, description="of forbidden alone: a group whose members may; null where there is none"
    )


class Error(Document):
    """Any answer with a status of 400 or above"""

    error: ErrorText


class Progress(Answer):
    """POST /v1/drain, /v1/resume; with ``wait``, one line of the stream that follows an operation"""

    operation: Literal["drain", "resume", "rebalance"]
    state: State
    sessions_left: int
    deadline_left_s: float | None
    abandoned: int | None
    stage: str | None
    item: str | None
    percent: float | None
    done: bool
    outcome: str | None = Field(description="what came of it, once it is done")
    error: ErrorText | None


class Request(BaseModel):
    """Strict, since a misspelt field that is ignored looks like obedience."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)


class NoFields(Request):
    """The body of POST /v1/resume and /v1/reload"""


class DrainRequest(Request):
    """The body of POST /v1/drain"""

    deadline_s: Annotated[float, Field(ge=0, le=MAX_DEADLINE_S, allow_inf_nan=False)] | None = None
    wait: bool = False


def _to_span(value: object) -> object:
    return BlockSpan.parse(value) if isinstance(value, str) else value


class RebalanceRequest(Request):
    """The body of POST /v1/rebalance; ``to`` as in "0:16"."""

    to: Annotated[BlockSpan, BeforeValidator(_to_span, json_schema_input_type=str)] | None = None
    dry_run: bool = False
    wait: bool = False
