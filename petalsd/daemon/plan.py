"""What this configuration means on this machine: model, device, dtype, memory, and how many blocks that is.

Nothing is started or allocated here; ``petalsd check`` and ``petalsd run`` make the same plan.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from petalsd.config import BlocksSection, Config, EngineSection, ModelSection
from petalsd.daemon.adapter_sources import open_adapters
from petalsd.daemon.memory import device_memory_bytes, free_memory_bytes
from petalsd.daemon.sizing import (
    ESTIMATED_GRAPHS,
    GraphMemory,
    MemoryNeed,
    block_weights_bytes,
    kv_tokens_for,
    max_session_tokens_for,
    memory_need,
)
from petalsd.engine.cache_geometry import cache_geometry
from petalsd.engine.limits import EngineLimits
from petalsd.errors import ConfigError, DeviceLost
from petalsd.kvcache.sizing import KVGeometry
from petalsd.models.adapters import Adapter
from petalsd.models.architecture import Architecture
from petalsd.models.contract import Block
from petalsd.models.ladder import Ladder, make_angles
from petalsd.models.model_config import ModelConfig, dtype_for
from petalsd.models.naming import dht_prefix
from petalsd.models.source import ModelSource
from petalsd.models.weight_storage import WeightStorage
from petalsd.models.weights import files_with
from petalsd.ops.eight_bit_kv import FLOAT8
from petalsd.paths import InstancePaths
from petalsd.types import BlockSpan

_HUB_URL = "https://huggingface.co/"
_CREDENTIAL = "credential:"
# Of the memory that is available at start; the rest is left to the system and to what others do meanwhile. What
# else a GPU needs is counted in the reserve.
_CPU_MEMORY_SHARE = 0.7
_KV_DTYPES = {"int8": torch.int8, "float8": FLOAT8}


@dataclass(frozen=True, slots=True)
class ServingPlan:
    """architecture  what the model's config.json describes
    adapters      what sessions and passes may ask for beside the model itself
    prefix        name of the model in the swarm
    repository    its page on the Hub, None for a directory
    storage       how weights are kept, and the dtype and device of all that is computed
    kv_tokens     tokens of cache per block
    memory_bytes  what serving may take
    has_graphs    decode steps are captured
    """

    source: ModelSource
    architecture: Architecture
    adapters: tuple[Adapter, ...]
    prefix: str
    repository: str | None
    storage: WeightStorage
    geometry: KVGeometry
    kv_tokens: int
    need: MemoryNeed
    memory_bytes: int
    limits: EngineLimits
    has_graphs: bool

    @property
    def model(self) -> ModelConfig:
        return self.architecture.config

    @property
    def device(self) -> torch.device:
        return self.storage.device

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def weights_name(self) -> str:
        """As a person reads it: bfloat16, or bfloat16 with int8 weights."""
        quantization = self.storage.quantization
        return self.dtype_name if quantization == "none" else f"{self.dtype_name} with {quantization} weights"

    @property
    def form_name(self) -> str:
        """The weights' name, with that of the cache where it has a precision of its own."""
        stored = self.geometry.stored
        if stored == self.dtype:
            return self.weights_name
        precision = str(stored).removeprefix("torch.").partition("_")[0]
        return f"{self.weights_name} with {precision} cache"

    @property
    def adapter_names(self) -> tuple[str, ...]:
        return tuple(adapter.name for adapter in self.adapters)

    @property
    def block_weights_bytes(self) -> int:
        """What the model's largest block takes with its adapters, the cache not included."""
        return block_weights_bytes(self.architecture, self.storage, self.adapters)

    def has_room_beside(self, num_blocks: int) -> bool:
        """Whether the weights of so many more blocks fit now; the cache they will use is there already."""
        share = _CPU_MEMORY_SHARE if self.device.type == "cpu" else 1.0
        return num_blocks * self.block_weights_bytes <= share * free_memory_bytes(self.device)

    def files_of(self, blocks: Iterable[int]) -> list[str]:
        """The files that hold these blocks. Raises WeightsError."""
        tensors = [name for index in blocks for name in self.architecture.tensor_names(index, self.source)]
        return files_with(self.source, tensors)


@dataclass(frozen=True, slots=True)
class Demand:
    """How many blocks are served, and which, if that is not for the swarm to decide.

    ``may_be_fewer``: the rule of placement may leave some of them to others.
    """

    num_blocks: int
    pinned: BlockSpan | None
    may_be_fewer: bool = False

    def __str__(self) -> str:
        if self.pinned is not None:
            return f"blocks {self.pinned}"
        return f"{'at most ' if self.may_be_fewer else ''}{self.num_blocks} blocks"

    def allows(self, span: BlockSpan) -> bool:
        if self.pinned is not None:
            return span == self.pinned
        return len(span) == self.num_blocks or (self.may_be_fewer and len(span) < self.num_blocks)


def make_plan(config: Config, paths: InstancePaths) -> ServingPlan:
    """Blocking: reads the model's config, perhaps from the Hub. ConfigError, UnsupportedModel or WeightsError."""
    source = open_source(config.model, paths)
    architecture = Architecture.read(source.config())
    adapters = open_adapters(config.model, source, architecture)
    model = architecture.config
    device = choose_device(config.engine.device)
    dtype = dtype_for(config.model.dtype, model, device)
    storage = WeightStorage.choose(dtype, device, config.model.quantization)
    make_angles(architecture, dtype, torch.device("cpu")).tables(
        1
    )  # bad ones are told before weights are fetched
    geometry = _geometry(config.engine, model, dtype, device)
    kv_tokens = kv_tokens_for(config.engine.kv_tokens, model)
    share = _CPU_MEMORY_SHARE if device.type == "cpu" else 1.0
    has_graphs = _has_graphs(config.engine, device)
    graphs = ESTIMATED_GRAPHS if has_graphs else GraphMemory()
    return ServingPlan(
        source=source,
        architecture=architecture,
        adapters=adapters,
        prefix=dht_prefix(
            model.model_type, config.model.source, source.is_directory, config.model.dht_prefix
        ),
        repository=None if source.is_directory else _HUB_URL + config.model.source,
        storage=storage,
        geometry=geometry,
        kv_tokens=kv_tokens,
        need=memory_need(architecture, storage, geometry, kv_tokens, graphs, adapters),
        memory_bytes=int(device_memory_bytes(device) * share),
        limits=_limits(config, max_session_tokens_for(config.engine.max_session_tokens, model, kv_tokens)),
        has_graphs=has_graphs,
    )


def _geometry(
    engine: EngineSection, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> KVGeometry:
    try:
        return cache_geometry(model, engine.page_tokens, dtype, device, _KV_DTYPES.get(engine.kv_dtype))
    except ValueError as error:
        raise ConfigError(
            f"engine.kv_dtype = {engine.kv_dtype!r}: {error}",
            hint="set engine.kv_dtype to int8, which takes little more memory, or to auto",
        ) from error


def _has_graphs(engine: EngineSection, device: torch.device) -> bool:
    if engine.graphs == "on" and device.type == "cpu":
        raise ConfigError(
            "engine.graphs = 'on': there are CUDA graphs on a GPU only, not on the CPU",
            hint="set engine.graphs to auto, or engine.device to a GPU",
        )
    return engine.graphs != "off" and device.type != "cpu"


def demand_for(plan: ServingPlan, blocks: BlocksSection, most: int | None = None) -> Demand:
    """At most ``most`` blocks; of a span that the configuration names these are the first ones.

    ConfigError when the span is not inside the model, or when not even one block fits.
    """
    total = plan.model.num_blocks
    if blocks.span is not None:
        if not BlockSpan(0, total).covers(blocks.span):
            raise ConfigError(f"blocks.span = {blocks.span}: {plan.source.name} has the blocks 0:{total}")
        span = blocks.span.first(most)
        return Demand(len(span), span)
    allowed = total if most is None else min(most, total)
    if blocks.count != "auto":
        return _whole_or_free(min(blocks.count, allowed), total)
    fitting = plan.need.fitting_blocks(plan.memory_bytes, allowed)
    if fitting == 0:
        raise ConfigError(
            f"blocks.count = auto: one block takes {size_text(plan.need.of_blocks(1))}, "
            f"there are {size_text(plan.memory_bytes)} for it on {plan.device}",
            hint="lower engine.kv_tokens, or set blocks.count to try all the same",
        )
    return replace(_whole_or_free(fitting, total), may_be_fewer=fitting < total)


def choose_device(setting: str) -> torch.device:
    """``auto`` is the GPU if torch sees one. For a GPU that is not there ConfigError, DeviceLost when none is.

    One that fell off its bus may be back at the next start.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if setting == "auto":
        return torch.device("cuda:0" if count else "cpu")
    device = torch.device("cuda:0" if setting == "cuda" else setting)
    if device.type == "cuda" and (device.index or 0) >= count:
        if count == 0 and torch.version.cuda is not None:
            raise DeviceLost("cudaErrorNoDevice", 100, "no CUDA-capable device is detected")
        raise ConfigError(
            f"engine.device = {setting!r}: torch {torch.__version__} sees {count} CUDA devices",
            hint="check the driver and that this torch was built for CUDA, or use cpu",
        )
    return device


def open_source(section: ModelSection, paths: InstancePaths) -> ModelSource:
    """The model's files, with the token read from its file."""
    return ModelSource(
        section.source,
        revision=section.revision,
        cache_dir=section.cache_dir or paths.weights_dir,
        token=read_token(section.token_file, paths.credentials_dir),
        offline=section.offline,
        max_disk_bytes=section.max_disk_bytes,
    )


class ModelReader:
    """``span_loader.WeightsReader`` over the plan's source.

    A block takes its memory in its ``turn``: see ``engine.captures.Capturing``.
    """

    def __init__(self, plan: ServingPlan, ladder: Ladder, turn: threading.Lock | None = None) -> None:
        self._plan = plan
        self._ladder = ladder
        self._turn = turn or threading.Lock()

    def keep_only(self, blocks: Iterable[int]) -> None:
        self._plan.source.release_all_but(self._plan.files_of(blocks))

    def fetch(self, span: BlockSpan, progress: Callable[[str, int, int], None]) -> None:
        self._plan.source.fetch(self._plan.files_of(span), progress)

    def load_block(self, index: int) -> Block:
        with self._turn:
            block = self._ladder.load(index)
            block.adapted = {
                adapter.name: self._ladder.adapt(block, adapter) for adapter in self._plan.adapters
            }
            return block


def size_text(num_bytes: int) -> str:
    """1.5 GiB; in smaller units what would be 0.0 GiB."""
    for unit, unit_bytes in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= 0.05 * unit_bytes:
            return f"{num_bytes / unit_bytes:.1f} {unit}"
    return f"{num_bytes} B"


def _whole_or_free(num_blocks: int, total: int) -> Demand:
    """All blocks leave nothing to choose: no delay, no balance checks."""
    return Demand(num_blocks, BlockSpan(0, total) if num_blocks == total else None)


def _limits(config: Config, max_session_tokens: int) -> EngineLimits:
    engine = config.engine
    return EngineLimits(
        max_batch_tokens=engine.max_batch_tokens,
        max_sessions=engine.max_sessions,
        max_peer_share=engine.max_peer_share,
        max_session_tokens=max_session_tokens,
        pass_deadline_s=engine.request_timeout_s,
    )


def read_token(setting: Path | None, credentials_dir: Path | None) -> str | None:
    """The token in the file, or in the credential for credential:NAME; ConfigError if there is none."""
    if setting is None:
        return None
    key = f"model.token_file = {setting}"
    name = str(setting).removeprefix(_CREDENTIAL)
    is_credential = name != str(setting)
    file = _credential_file(key, name, credentials_dir) if is_credential else setting
    try:
        token = file.read_text(encoding="utf-8").strip()
    except OSError as error:
        hint = f"LoadCredential={name}:FILE in the service's unit passes it" if is_credential else ""
        raise ConfigError(f"{key}: {error.strerror}", hint=hint) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}: holds no token: it is not text") from error
    if not token or any(character.isspace() for character in token):
        raise ConfigError(f"{key}: holds no token", hint="one line, nothing else")
    return token


def _credential_file(key: str, name: str, directory: Path | None) -> Path:
    """Where the service manager keeps the secret ``name`` for this process alone; ConfigError if it keeps none."""
    if not name or "/" in name or name in (".", ".."):
        raise ConfigError(f"{key}: write credential:NAME, with the name that LoadCredential= gives it")
    if directory is None:
        raise ConfigError(
            f"{key}: no credentials were passed to this process",
            hint="systemd passes them to the service alone: start it, or name a file",
        )
    return directory / name
