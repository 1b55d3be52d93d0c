"""Documents as a daemon sends them, for rendering; `document(...)` changes single values of the usual one."""

from __future__ import annotations

import copy
from typing import Any

PEER = "12D3KooWGZ5SbcNYrwZkCMCXA3C3T3bQ3dJe6F4aJ6tVSwyF8ZcK"
OTHER = "12D3KooWHkP8Bo4gVZ3uRk1d9sVt6mD4WJbS5t1ZyGf7Qa2LxYpR"


def trial(path: str, kernels: str, error: float | None, tolerance: float = 1e-4) -> dict[str, Any]:
    is_passed = error is not None and error <= tolerance
    return {
        "path": path, "kernels": kernels, "error": error, "tolerance": tolerance, "is_passed": is_passed,
        "duration_s": 0.01,
    }  # fmt: skip


STATUS: dict[str, Any] = {
    "schema_version": 1,
    "role": "server",
    "version": "0.1.0",
    "instance": "demo",
    "state": "online",
    "reason": "",
    "summary": "Serving blocks 0:15 of 30 of SmolLM2-135M-Instruct-hf: 3 sessions, 23% of the cache used",
    "since_s": 11_520.0,
    "uptime_s": 11_532.5,
    "pid": 4321,
    "peer_id": PEER,
    "maddrs": [f"/ip4/10.0.0.7/tcp/31337/p2p/{PEER}"],
    "is_relayed": False,
    "model": {
        "source": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "dht_prefix": "SmolLM2-135M-Instruct-hf",
        "num_blocks": 30,
        "family": "llama",
        "dtype": "bfloat16",
        "quantization": "none",
        "adapters": [],
        "device": "cpu",
        "path": "fused",
        "kernels": "avx2",
        "block_kinds": [{"kind": "uniform", "trials": [trial("fused", "avx2", 9.8e-3, tolerance=2.9e-2)]}],
    },
    "span": {"start": 0, "end": 15},
    "served_span": {"start": 0, "end": 15},
    "loading": None,
    "kv": {
        "pages_total": 7_680,
        "pages_free": 5_914,
        "page_tokens": 16,
        "tokens_left": 15 * 12_600,  # summed over the blocks
        "pages_reserved": 3_600,
        "spill": {
            "max_bytes": 2_264_924_160,
            "file_bytes": 67_108_864,
            "pages_promisable": 92_160,
            "pages_spilled": 512,
        },
        "prefixes": {
            "max_bytes": 734_003_200,
            "bytes": 117_440_512,
            "tokens_seen": 48_210,
            "tokens_reused": 37_632,
        },
    },
    "graphs": None,
    "sessions": {"active": 3, "limit": 256, "rows": 4, "waiting": 0},
    "throughput": {
        "tokens_per_s": 251.3,
        "inference_rps": 2138.0,
        "forward_rps": 2008.4,
        "network_rps": 10851.0,
        "source": "served",
        "network_source": "assumed",
    },
    "balance": {"quality": 0.75, "next_check_s": 12.0, "last_move": None, "is_pinned": False},
    "drain": None,
    "watchdog": {"interval_s": 60.0, "last_ping_s": 12.0, "engine_last_step_s": 0.4},
    "warnings": [],
}

SESSIONS: dict[str, Any] = {
    "schema_version": 1,
    "sessions": [
        {
            "id": "b7e2c9d0a1f34e5f",
            "peer": OTHER,
            "span": {"start": 0, "end": 15},
            "rows": 1,
            "position": 1234,
            "max_tokens": 2048,
            "age_s": 93.0,
            "idle_s": 0.2,
            "kv_pages": 1170,
        },
        {
            "id": "01",
            "peer": PEER,
            "span": {"start": 5, "end": 15},
            "rows": 2,
            "position": 17,
            "max_tokens": 512,
            "age_s": 1.5,
            "idle_s": 75.0,
            "kv_pages": 40,
        },
    ],
}

PEERS: dict[str, Any] = {
    "schema_version": 1,
    "peers": [
        {
            "peer_id": OTHER,
            "state": "joining",
            "span": {"start": 15, "end": 25},
            "throughput": 98.5,
            "inference_rps": None,
            "forward_rps": None,
            "network_rps": None,
            "cache_tokens_left": 4096,
            "public_name": "a friend",
            "version": "2.3.0.dev2",
            "is_relayed": True,
            "ping_ms": 23.4,
            "is_self": False,
            "is_ghost": False,
        },
        {
            "peer_id": PEER,
            "state": "online",
            "span": {"start": 0, "end": 15},
            "throughput": 123.4,
            "inference_rps": 987.0,
            "forward_rps": 2345.6,
            "network_rps": 10850.0,
            "cache_tokens_left": 25_200,
            "public_name": None,
            "version": "0.1.0",
            "is_relayed": False,
            "ping_ms": None,
            "is_self": True,
            "is_ghost": False,
        },
    ],
    "uncovered": [{"start": 25, "end": 30}],
}

PLAN: dict[str, Any] = {
    "schema_version": 1,
    "current": {"start": 0, "end": 15},
    "proposed": {"start": 15, "end": 30},
    "gain": {
        "swarm_throughput_before": 41.0,
        "swarm_throughput_after": 123.4,
        "ratio": 3.01,
        "tokens": 8240.0,
    },
    "cost": {"blocks_to_load": 15, "blocks_kept": 0, "seconds_estimate": 95.0, "tokens": 1200.4},
    "weakest": [{"start": 15, "end": 22}, {"start": 25, "end": 30}],
    "ahead": [
        {"peer_id": "QmServerB", "current": {"start": 0, "end": 15}, "target": {"start": 10, "end": 25}}
    ]
    * 5,
    "sessions_touched": 3,
    "sessions_kept": 0,
    "would_move": True,
    "explanation": "blocks 15:30 are the slowest of the swarm",
}

PROGRESS: dict[str, Any] = {
    "schema_version": 1,
    "operation": "drain",
    "state": "draining",
    "sessions_left": 3,
    "deadline_left_s": 42.0,
    "stage": None,
    "item": None,
    "percent": None,
    "abandoned": None,
    "done": False,
    "outcome": None,
    "error": None,
}


def document(usual: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy of ``usual`` with ``changes`` at its top level."""
    return copy.deepcopy(usual) | changes


BOOTSTRAP_STATUS: dict[str, Any] = {
    "schema_version": 1,
    "role": "bootstrap",
    "version": "0.1.0",
    "instance": "boot",
    "state": "online",
    "reason": "",
    "summary": "Bootstrap node: 12 peers known, 3400 keys of the directory kept",
    "since_s": 11_520.0,
    "uptime_s": 11_532.5,
    "pid": 4321,
    "peer_id": "QmZRjeJbu1KXG6EfA1G7zXnad2JoYNQf6uQDjWAFuN7trL",
    "maddrs": [
        "/ip4/127.0.0.1/tcp/31337/p2p/QmZRjeJbu1KXG6EfA1G7zXnad2JoYNQf6uQDjWAFuN7trL",
        "/ip4/192.0.2.7/tcp/31337/p2p/QmZRjeJbu1KXG6EfA1G7zXnad2JoYNQf6uQDjWAFuN7trL",
    ],
    "is_reachable": True,
    "initial_peers": {"total": 2, "known": 1},
    "known_peers": 12,
    "stored_keys": 3400,
    "watchdog": {"interval_s": 60.0, "last_ping_s": 12.0},
    "warnings": [],
}

SWARM: dict[str, Any] = {
    "schema_version": 1,
    "models": [
        {
            "dht_prefix": "SmolLM2-135M-Instruct-hf",
            "repository": "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
            "num_blocks": 30,
            "peers": PEERS["peers"],
            "uncovered": [],
        },
        {
            "dht_prefix": "other",
            "repository": None,
            "num_blocks": 1,
            "peers": [],
            "uncovered": [{"start": 0, "end": 1}],
        },
    ],
}
