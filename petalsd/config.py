"""Every configuration key: its meaning, type, default, and whether a reload applies it.

A section is a frozen pydantic model. Types are strict (a file says 12, not "12"); text from the environment
and the command line is converted in ``config_loading``, which also knows the layers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from petalsd.config_addresses import check_maddr, check_peer_id
from petalsd.types import BlockSpan, HostPort

_SIZE = re.compile(r"(\d{1,18}(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_PUBLIC = "public"
BOOTSTRAP_KEYS = re.compile(
    r"swarm\.(initial_peers|host_maddrs|announce_maddrs|identity_path)|(control|metrics)\..+"
    r"|daemon\.(role|log_format|log_level)"
)
"""The keys that a bootstrap node obeys."""
_BOOTSTRAP_MADDRS = ("/ip4/0.0.0.0/tcp/31337", "/ip6/::/tcp/31337")  # others have its address in their files
_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def _to_path(value: object) -> object:
    if isinstance(value, str) and "\0" in value:
        raise ValueError("should be a path, which has no zero bytes")
    if isinstance(value, str) and value:
        try:
            return Path(value).expanduser()
        except RuntimeError:
            raise ValueError("is in the home of nobody that this machine knows") from None
    return _instance_of(Path, value, "should be a path")


def _not_empty(value: object) -> object:
    if value == "":
        raise ValueError("should not be empty; leave an optional key out instead")
    return value


def _to_tuple(value: object) -> object:
    if isinstance(value, list):
        return tuple(value)
    return _instance_of(tuple, value, 'should be a list, as in ["one", "two"]')


def _to_peer_ids(value: object) -> object:
    for peer_id in value if isinstance(value, list) else ():
        check_peer_id(peer_id)
    return _to_tuple(value)


def _instance_of(kind: type, value: object, rule: str) -> object:
    """``value`` where it was made from text before; else ValueError, for pydantic would name our class."""
    if not isinstance(value, kind):
        raise ValueError(rule)
    return value


def _to_bytes(value: object) -> object:
    """50 GB, 64GiB or a number of bytes."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError('should be a number of bytes, or text as in "50GB"')
    return int(float(match[1]) * (_DECIMAL | _BINARY)[(match[2] or "").upper()])


def _to_span(value: object) -> object:
    if isinstance(value, str):
        return BlockSpan.parse(value)
    return _instance_of(BlockSpan, value, 'should be text as in "0:16"')


def _without_nf4(value: object) -> object:
    if value == "nf4":
        raise ValueError("write int4, which takes as much memory")
    return value


def _to_host_port(value: object) -> object:
    if isinstance(value, str):
        return HostPort.parse(value)
    return _instance_of(HostPort, value, 'should be text as in "127.0.0.1:9464"')


def _to_device(value: object) -> object:
    if isinstance(value, str) and _DEVICE.fullmatch(value):
        return value
    raise ValueError("should be auto, cpu, cuda or cuda:N")


def _to_maddrs(value: object) -> object:
    for maddr in value if isinstance(value, list) else ():
        check_maddr(maddr, needs_peer=False)
    return _to_tuple(value)


def _to_host_maddrs(value: object) -> object:
    """A server that listens nowhere would be announced without an address."""
    if value == []:
        raise ValueError("a server listens somewhere: leave the key out to listen everywhere")
    return _to_maddrs(value)


def _to_peers(value: object) -> object:
    if isinstance(value, str):
        if value != _PUBLIC:
            raise ValueError('should be a list of multiaddrs, or the word "public"')
        return value
    for maddr in value if isinstance(value, list) else ():
        check_maddr(maddr, needs_peer=True)
    return _to_tuple(value)


Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, BeforeValidator(_not_empty)]
AutoCount = Literal["auto"] | Count
PathText = Annotated[Path, BeforeValidator(_to_path)]
SizeBytes = Annotated[int, BeforeValidator(_to_bytes), Field(ge=1)]
AutoSizeBytes = Literal["auto"] | Annotated[int, BeforeValidator(_to_bytes), Field(ge=0)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_to_tuple)]
Maddrs = Annotated[tuple[str, ...], BeforeValidator(_to_maddrs)]
HostMaddrs = Annotated[tuple[str, ...], BeforeValidator(_to_host_maddrs)]
PeerIds = Annotated[tuple[str, ...], BeforeValidator(_to_peer_ids)]
PeerMaddrs = Annotated[Literal["public"] | tuple[str, ...], BeforeValidator(_to_peers)]
Span = Annotated[BlockSpan, BeforeValidator(_to_span)]
Quantization = Literal["none", "int8", "int4"]
ListenAddress = Annotated[HostPort, BeforeValidator(_to_host_port)]


def _restart(default: Any, meaning: str) -> Any:
    """A key that is read at start only; a reload that changes it says that a restart is needed."""
    return Field(default, description=meaning, json_schema_extra={"live": False})


def _live(default: Any, meaning: str) -> Any:
    """A key whose change a reload (SIGHUP) applies."""
    return Field(default, description=meaning, json_schema_extra={"live": True})


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)


class ModelSection(Section):
    source: Text = _restart(..., "Hub repository or directory of the model")
    revision: Text | None = _restart(None, "branch, tag or commit of the repository")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _restart(
        "auto", "dtype of weights, cache and answers; auto: the model's own, bfloat16 where that is float32"
    )
    quantization: Annotated[Quantization, BeforeValidator(_without_nf4)] = _restart(
        "none", "how the weights of linear layers are kept: as dtype says, in 8 bits, or in 4"
    )
    adapters: Texts = _restart(
        (),
        "LoRA adapters that clients may ask for by name: Hub repositories, or directories called as these are",
    )
    dht_prefix: Text | None = _restart(None, "name of the model in the swarm; derived from source if unset")
    token_file: PathText | None = _restart(
        None,
        "file that holds the Hub token; credential:NAME is a credential of the service (LoadCredential=)",
    )
    offline: bool = _restart(False, "never ask the Hub; use what is in the cache")
    cache_dir: PathText | None = _restart(None, "where weights are kept; unset: the cache directory")
    max_disk_bytes: SizeBytes | None = _restart(None, 'bound on cached weights, bytes or text as in "50GB"')


class BlocksSection(Section):
    count: AutoCount = _live(
        "auto",
        "number of blocks to serve; auto: as many as fit the memory, or fewer where the swarm gains by it",
    )
    span: Span | None = _live(None, 'pins the blocks, for instance "0:16"; no rebalancing then')
    balance_quality: Annotated[float, Field(ge=0, allow_inf_nan=False)] = _live(
        0.75, "a move must win 1/quality times the work that it costs the swarm; 0 never moves"
    )
    balance_period_s: Seconds = _live(
        10.0, "mean time between health and balance checks; longer in swarms where one takes over 2 % of it"
    )
    join_delay_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = _live(
        5.0, "mean random delay before choosing blocks, so that servers started together see each other"
    )


class SwarmSection(Section):
    initial_peers: PeerMaddrs = _restart(
        (), 'multiaddrs of peers to join; empty starts a private swarm; "public" joins the public one'
    )
    host_maddrs: HostMaddrs = _restart(
        ("/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/0"),
        "multiaddrs to listen on; port 0: any free one, another at each start; a bootstrap node takes 31337",
    )
    announce_maddrs: Maddrs = _restart((), "multiaddrs told to others; empty: what is listened on")
    identity_path: PathText | None = _restart(
        None, "private key file, made if missing; unset: state directory"
    )
    public_name: Text | None = _restart(None, "name shown in swarm dashboards")
    relay: bool = _restart(True, "reach, and be reached by, peers behind a NAT through relays")
    # Our own nodes of the DHT keep no record for more than six hours (swarm.dht_storage).
    update_period_s: Annotated[Seconds, Field(ge=1, le=7200)] = _restart(
        120.0, "period of announcements, one second to two hours; records live for twice as long"
    )
    allowed_peers: PeerIds = _restart((), "PeerIDs of the clients that may use this server; empty: everybody")
    throughput: Literal["auto"] | Annotated[float, Field(gt=0, allow_inf_nan=False)] = _restart(
        "auto",
        "tokens/s announced to the swarm; auto: measured once, kept, and then as clients' requests show",
    )
    network_mbps: Literal["auto"] | Annotated[float, Field(gt=0, allow_inf_nan=False)] = _restart(
        "auto",
        "Mbit/s of the slower direction of the network link; auto: what transfers show, 100 until they do",
    )


class EngineSection(Section):
    device: Annotated[str, BeforeValidator(_to_device)] = _restart(
        "auto", "auto (CUDA if there is one), cpu, cuda or cuda:N"
    )
    kv_tokens: AutoCount = _restart(
        "auto",
        "attention cache: tokens per block over all sessions; auto: 16384, or 4096 without grouped queries",
    )
    kv_spill_bytes: AutoSizeBytes = _restart(
        "auto",
        "disk space for the attention cache of idle sessions, so that more are admitted than memory holds; bytes "
        'or text as in "20GB"; auto: 12 times the cache, at most half of what is free; 0: none',
    )
    kv_host_bytes: AutoSizeBytes = _restart(
        "auto",
        "page-locked host memory for the attention cache of idle sessions on a GPU, before the disk is used; "
        'bytes or text as in "8GB"; auto: twice the cache, at most a quarter of what is available; 0: none',
    )
    prefix_cache_bytes: AutoSizeBytes = _restart(
        "auto",
        "host memory that keeps beginnings of prompts, so that a client's next session with the same one does not "
        'compute it again; bytes or text as in "2GB"; auto: a thirty-second of what is available, at most 4 GiB; '
        "0: none",
    )
    max_peer_share: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = _restart(
        0.75, "share of the attention cache, and of max_sessions, that one peer may have; 1: all of it"
    )
    kv_dtype: Literal["auto", "int8", "float8"] = _restart(
        "auto",
        "the attention cache's precision; auto: the model's; int8: about half of bfloat16's bytes; float8: half, "
        "on GPUs of compute capability 8.9 and above",
    )
    page_tokens: Annotated[int, Field(ge=16, le=1024, multiple_of=16)] = _restart(
        32, "tokens per page of the attention cache, a multiple of 16"
    )
    max_session_tokens: AutoCount = _restart(
        "auto", "longest session; auto: 8192, or 2048 without grouped queries, at most kv_tokens"
    )
    max_batch_tokens: Annotated[int, Field(ge=2)] = _restart(
        1024, "tokens computed at once; longer steps are split, not refused"
    )
    max_sessions: Count = _restart(256, "sequences served at once")
    request_timeout_s: Seconds = _restart(180.0, "limit of one forward or backward request")
    step_timeout_s: Seconds = _restart(300.0, "how long a session may wait for its client's next step")
    session_timeout_s: Seconds = _restart(1800.0, "limit of a whole session")
    graphs: Literal["auto", "on", "off"] = _restart(
        "auto",
        "captured CUDA graphs for decoding; auto: on GPUs; where capturing fails, steps are launched without, and "
        "a warning says so",
    )
    threads: Annotated[int, Field(ge=0, le=1024)] = _restart(
        0, "CPU threads of the engine, 1024 at most; 0: torch's choice, within the service's CPUQuota="
    )


class ControlSection(Section):
    socket: PathText | None = _restart(
        None, "path of the control socket; unset: control.sock in the runtime directory"
    )
    group: Text | None = _restart(
        None,
        "group whose members may drain, rebalance and reload; unset: petalsd where there is such a group",
    )


class MetricsSection(Section):
    listen: ListenAddress | None = _restart(
        None, "host:port where everybody may read metrics and health; unset: the control socket alone"
    )


class DaemonSection(Section):
    role: Literal["server", "bootstrap"] = _restart(
        "server",
        "server: serves blocks of a model; bootstrap: serves none, and is where others join the swarm, so that it "
        "takes only the keys of [swarm] that say how to be reached, [control], [metrics] and the log's",
    )
    drain_deadline_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = _live(
        60.0, "how long a stop waits for running sessions"
    )
    log_format: Literal["auto", "json", "console", "journal"] = _restart(
        "auto", "auto: console on a terminal, journal where systemd connects standard error to it, else json"
    )
    log_level: Literal["debug", "info", "warning", "error"] = _live(
        "info", "least severe level that is logged"
    )


class Config(Section):
    """The whole configuration; made by ``config_loading.load_config``, passed on in sections."""

    model: ModelSection
    blocks: BlocksSection = BlocksSection()
    swarm: SwarmSection = SwarmSection()
    engine: EngineSection = EngineSection()
    control: ControlSection = ControlSection()
    metrics: MetricsSection = MetricsSection()
    daemon: DaemonSection = DaemonSection()

    @model_validator(mode="before")
    @classmethod
    def _without_a_model(cls, sections: dict[str, Any]) -> dict[str, Any]:
        """A node that serves nothing needs no model; keys that it would not obey are refused."""
        if sections.get("daemon", {}).get("role") != "bootstrap":
            return sections
        given = [f"{section}.{key}" for section, keys in sections.items() for key in keys]
        if idle := [key for key in given if not BOOTSTRAP_KEYS.fullmatch(key)]:
            raise ValueError(
                f'daemon.role = "bootstrap" serves no blocks and does not obey {", ".join(idle)}: take that out'
            )
        swarm = {"host_maddrs": list(_BOOTSTRAP_MADDRS), **sections.get("swarm", {})}
        return {**sections, "model": ModelSection.model_construct(source=""), "swarm": swarm}

    @model_validator(mode="after")
    def _check_together(self) -> Config:
        if self.blocks.span is not None and self.blocks.count != "auto":
            raise ValueError("blocks.span and blocks.count exclude each other: keep one of them")
        kv_tokens, longest = self.engine.kv_tokens, self.engine.max_session_tokens
        if kv_tokens != "auto" and longest != "auto" and longest > kv_tokens:
            raise ValueError(
                f"engine.max_session_tokens = {longest} is above engine.kv_tokens = {kv_tokens}: "
                "no session could ever be that long; raise kv_tokens or lower max_session_tokens"
            )
        return self
