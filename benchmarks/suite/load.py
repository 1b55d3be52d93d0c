"""Loading the model in every format: seconds, resident memory against the model's own bytes, memory of a session.

Each in a process of its own, with the files in the page cache. The memory is that after all kinds of use: decode
steps, a prefill, a backward pass. A session holds 256 tokens.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from benchmarks.benchmark import Benchmark, Options
from benchmarks.local_model import REFERENCE_FORMATS, formats
from benchmarks.machine import ROOT
from benchmarks.memory_probe import SESSION_TOKENS
from benchmarks.report import OURS, TRANSFORMERS, Row
from benchmarks.timing import summarize

SESSIONS = 8
PROBE_DEADLINE_S = 120.0


def run(options: Options) -> list[Row]:
    rows = []
    for kind in formats()[:1] if options.smoke else formats():
        for provider in (OURS, TRANSFORMERS):
            is_known = provider == OURS or kind in REFERENCE_FORMATS
            if is_known and options.has_time(f"{provider} {kind}", 10.0):
                rows += to_rows(provider, kind, probe(provider, kind, options))
    return rows


def probe(provider: str, kind: str, options: Options) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "benchmarks.memory_probe", "--model", str(options.model),
        "--provider", provider, "--format", kind, "--sessions", str(2 if options.smoke else SESSIONS),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PROBE_DEADLINE_S)
    if done.returncode != 0:
        raise RuntimeError(f"the probe of {provider} in {kind} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def to_rows(provider: str, kind: str, found: dict[str, Any]) -> list[Row]:
    setting = {"format": kind}
    resident = max(1, found["resident_bytes"])  # a tiny model finds room in what others left
    rows = [
        Row(provider, setting, "load time", "s", summarize(found["load_s"])),
        Row(provider, setting, "resident weights", "MiB", summarize([resident / 2**20])),
    ]
    if provider == OURS:
        ratio = summarize([resident / found["model_bytes"]])
        rows.append(Row(provider, setting, "resident weights over the model's bytes", "x", ratio))
        of_session = {**setting, "context": SESSION_TOKENS}
        of_one = max(1, found["session_bytes"])  # and so do its sessions
        kib = summarize([of_one / 2**10])
        over = summarize([of_one / found["session_kv_bytes"]])
        rows += [
            Row(provider, of_session, "memory of a session", "KiB", kib),
            Row(provider, of_session, "memory of a session over its keys and values", "x", over),
        ]
    return rows


BENCHMARK = Benchmark("load", "loading in every format, resident memory, and memory of a session", run, 45.0)
