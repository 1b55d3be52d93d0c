"""Runs jobs with the stock client, one after another: a line of JSON in, a line of JSON out.

    in    {"id": 1, "job": "generate", "arguments": {"swarm": {...}, "input_ids": [[5, 99]], ...}}
    out   answer 1 {"output_ids": [[5, 99, 17]]}      or      failed 1 (with the traceback before it)

The jobs are the functions of generate.py, interrupted.py, passes.py and load.py.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from generate import generate
from interrupted import begin_generation, finish_generation
from load import close_sessions, decode, open_sessions
from passes import passes

JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    "generate": generate,
    "begin_generation": begin_generation,
    "finish_generation": finish_generation,
    "passes": passes,
    "open_sessions": open_sessions,
    "decode": decode,
    "close_sessions": close_sessions,
}


def main() -> None:
    # A stock session whose server was quicker to close the stream (BrokenPipeError) counts as open, closes itself
    # again when it is collected, and waits for Petals' loop there. On that loop's own thread it would for ever, so
    # garbage is collected between the jobs, on this one.
    gc.disable()
    print("ready", flush=True)  # noqa: T201 - the protocol
    for line in sys.stdin:
        request = json.loads(line)
        torch.manual_seed(0)
        try:
            answer = JOBS[request["job"]](**request["arguments"])
        except Exception:
            traceback.print_exc()
            print("failed", request["id"], flush=True)  # noqa: T201 - the protocol
        else:
            print("answer", request["id"], json.dumps(answer), flush=True)  # noqa: T201 - the protocol
        gc.collect()


if __name__ == "__main__":
    main()
