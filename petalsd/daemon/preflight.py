"""Everything that can be validated without serving, as a list of findings for a person to read."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from petalsd.config import Config
from petalsd.control.access import Access
from petalsd.daemon.plan import ServingPlan, demand_for, make_plan, size_text
from petalsd.daemon.prefix_room import prefix_cache_bytes
from petalsd.daemon.spilling import plan_spill
from petalsd.errors import ConfigError, PetalsdError
from petalsd.paths import InstancePaths, check_socket_path, existing_part
from petalsd.swarm.identity import read_peer_id
from petalsd.types import BlockSpan, HostPort


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. ``text`` says what was found, or what is wrong and what to do."""

    name: str
    is_ok: bool
    text: str


def inspect(config: Config, paths: InstancePaths) -> Iterator[Finding]:
    """Findings in the order of a start, each as soon as it is known. Writes nothing but the Hub's cache."""
    identity = config.swarm.identity_path or paths.identity_file
    yield _finding("identity", lambda: _check_identity(identity))
    yield _finding("state directory", lambda: _check_writable(paths.state_dir))
    if config.daemon.role == "server":
        yield from _inspect_model(config, paths)
    yield Finding("swarm", True, _describe_swarm(config))
    yield _finding("control group", lambda: _check_group(config))
    control_socket = config.control.socket or paths.control_socket
    yield _finding("control socket", lambda: _check_socket(control_socket))
    if (address := config.metrics.listen) is not None:
        yield _finding("metrics", lambda: _check_metrics(address))


def _inspect_model(config: Config, paths: InstancePaths) -> Iterator[Finding]:
    """What the blocks need."""
    yield _finding("weights cache", lambda: _check_writable(config.model.cache_dir or paths.weights_dir))
    plan: ServingPlan | None = None
    try:
        plan = make_plan(config, paths)
    except PetalsdError as error:
        yield Finding("model", False, _text(error))
    if plan is not None:
        known_plan = plan
        yield Finding("model", True, _describe_model(plan))
        yield _finding("weights", lambda: _check_weights(known_plan, config))
        if known_plan.adapters:
            yield Finding("adapters", True, ", ".join(known_plan.adapter_names))
        yield _finding("device", lambda: f"{known_plan.device}, {known_plan.weights_name}")
        yield _finding("blocks", lambda: _check_blocks(known_plan, config))
        yield _finding("limits", lambda: _describe_limits(known_plan))
        yield _finding("prefix cache", lambda: _describe_prefixes(config))
        yield _finding("spill file", lambda: _check_spill(known_plan, config, paths))


def _finding(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, check())
    except PetalsdError as error:
        return Finding(name, False, _text(error))
    except OSError as error:
        return Finding(name, False, f"{error.filename}: {error.strerror}")


def _text(error: PetalsdError) -> str:
    return f"{error.message} ({error.hint})" if error.hint else error.message


def _check_identity(path: Path) -> str:
    if path.exists():
        return f"{read_peer_id(path)} from {path}"
    _check_writable(path.parent)
    return f"{path} will be made"


def _check_writable(directory: Path) -> str:
    """The directory, or the nearest existing one above it, lets us write."""
    existing = existing_part(directory)
    if not existing.is_dir():
        raise NotADirectoryError(0, "is not a directory", str(existing))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(0, "is not writable by this user", str(existing))
    return str(directory) if existing == directory else f"{directory} will be made"


def _describe_model(plan: ServingPlan) -> str:
    model = plan.model
    return (
        f"{plan.source.name}: {model.model_type}, {model.num_blocks} blocks, hidden size {model.hidden_size}, "
        f"called {plan.prefix} in the swarm"
    )


def _check_weights(plan: ServingPlan, config: Config) -> str:
    """A file for every tensor of every block; those of a directory are sound, as far as they may be served."""
    whole = BlockSpan(0, plan.model.num_blocks)
    files = plan.files_of(whole)
    pinned = config.blocks.span
    plan.source.check_files(files if pinned is None or not whole.covers(pinned) else plan.files_of(pinned))
    return f"all tensors found in {len(files)} safetensors files"


def _check_blocks(plan: ServingPlan, config: Config) -> str:
    demand = demand_for(plan, config.blocks)
    need_bytes = plan.need.of_blocks(demand.num_blocks)
    what = f"{demand.num_blocks} of {plan.model.num_blocks} blocks"
    if demand.pinned is not None and demand.pinned != BlockSpan(0, plan.model.num_blocks):
        what += f" ({demand.pinned})"
    need, there = size_text(need_bytes), size_text(plan.memory_bytes)
    memory = f"take {need} with weights and cache, {there} are there for it"
    if need_bytes > plan.memory_bytes:
        fitting = plan.need.fitting_blocks(plan.memory_bytes, plan.model.num_blocks)
        raise PetalsdError(f"{what} {memory}", hint=f"{fitting} blocks fit; or lower engine.kv_tokens")
    return f"{what} {memory}"


def _describe_limits(plan: ServingPlan) -> str:
    return (
        f"{plan.kv_tokens} tokens of cache per block, sessions up to {plan.limits.max_session_tokens} tokens, "
        f"{plan.limits.max_sessions} sequences at once"
    )


def _describe_prefixes(config: Config) -> str:
    max_bytes = prefix_cache_bytes(config.engine)
    return f"up to {size_text(max_bytes)} of memory" if max_bytes else "off"


def _check_spill(plan: ServingPlan, config: Config, paths: InstancePaths) -> str:
    num_blocks = demand_for(plan, config.blocks).num_blocks
    spill = plan_spill(config.engine, plan, paths, num_blocks)
    if spill.area is not None:
        _check_writable(spill.area.directory)
    return spill.summary


def _describe_swarm(config: Config) -> str:
    peers = config.swarm.initial_peers
    if not peers:
        return "a private swarm of our own"
    return "the public swarm" if peers == "public" else f"joins through {len(peers)} peers"


def _check_group(config: Config) -> str:
    return f"{Access.of(config.control.group).actors} may act"


def _check_socket(path: Path) -> str:
    check_socket_path(path)
    if path.exists() and not path.is_socket():
        raise ConfigError(
            f"control.socket = {path}: there is something else than a socket",
            hint="move it away, or set control.socket to another path",
        )
    _check_writable(path.parent)
    return str(path)


def _check_metrics(address: HostPort) -> str:
    """Whether a server could listen there. A port that is taken may be taken by this very instance."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            return f"{address}, taken at the moment: by this instance, if it runs"
        raise ConfigError(
            f"metrics.listen = {str(address)!r}: {getattr(error, 'strerror', None) or error}",
            hint="name an address of this machine and a free port, for instance 127.0.0.1:9464",
        ) from error
    return str(address)
