"""``python -m petalsd.demo MODEL_DIRECTORY``: a private swarm of two daemons on loopback answers one question."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from petalsd.demo.daemons import DaemonProcess, deferred_interrupts
from petalsd.demo.progress import Progress
from petalsd.errors import PetalsdError
from petalsd.imports import heavy_imports
from petalsd.log import configure_logging
from petalsd.types import BlockSpan

if TYPE_CHECKING:
    from petalsd.client.model import RemoteCausalLM

QUESTION = "What is gravity? Answer in two sentences."
PREFIX = "SmolLM2-135M-Instruct-hf"
NUM_BLOCKS = 30
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0
MAX_NEW_TOKENS = 96


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m petalsd.demo", description=__doc__)
    parser.add_argument("model", type=Path, help="model directory, as `make demo-model` makes it")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--state", type=Path, help="keep identities and measurements here for the next run")
    arguments = parser.parse_args()
    configure_logging("console", "warning")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    progress = Progress(sys.stdout)
    try:
        with contextlib.ExitStack() as stack:
            scratch = arguments.state or stack.enter_context(
                tempfile.TemporaryDirectory(prefix="petalsd-demo-")
            )
            daemons = Daemons(arguments.model.resolve(), Path(scratch).resolve(), stack)
            run_demo(daemons, arguments.question, progress)
    except (PetalsdError, OSError) as error:  # the latter for files: a state directory, a full disk
        print(f"\nthe demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        progress.console.print("\ninterrupted; everything is stopped")
        return 128 + signal.SIGINT
    return 0


class Daemons:
    """Starts daemons of one model with their files in ``directory``; ``stack`` stops them, however it ends."""

    def __init__(self, model: Path, directory: Path, stack: contextlib.ExitStack) -> None:
        self.model = model
        self.stack = stack
        self.running: list[DaemonProcess] = []
        self._directory = directory

    def start(self, name: str, span: BlockSpan, peers: list[str]) -> DaemonProcess:
        """`petalsd run` with a configuration file of its own."""
        state = self._directory / name
        state.mkdir(parents=True, exist_ok=True)
        config = state / f"{name}.toml"
        quoted_peers = ", ".join(map(_quoted, peers))
        config.write_text(
            f'[model]\nsource = {_quoted(self.model)}\ndtype = "float32"\ndht_prefix = "{PREFIX}"\n'
            f'[blocks]\nspan = "{span}"\n'
            f'[swarm]\nhost_maddrs = ["/ip4/127.0.0.1/tcp/0"]\ninitial_peers = [{quoted_peers}]\n'
            "[engine]\nthreads = 1\n"
            f"[control]\nsocket = {_quoted(state / 'control.sock')}\n"
            '[daemon]\nlog_format = "json"\n'
        )
        daemon = DaemonProcess(name, config, state)
        with deferred_interrupts():
            daemon.start()
            self.stack.callback(daemon.stop, STOP_TIMEOUT_S)
        self.running.append(daemon)
        return daemon


def _quoted(value: object) -> str:
    """As TOML, of which JSON's texts are a part."""
    return json.dumps(str(value), ensure_ascii=False)


def run_demo(daemons: Daemons, question: str, progress: Progress) -> None:
    """Start two daemons, ask, show."""
    progress.console.print("[bold]A private swarm of two daemons, each serving half of the 30 blocks[/bold]")
    daemons.stack.callback(_say_stopped, progress)
    spans = BlockSpan(0, NUM_BLOCKS // 2), BlockSpan(NUM_BLOCKS // 2, NUM_BLOCKS)
    with progress.task(f"starting the first daemon, blocks {spans[0]}"):
        first = daemons.start("first", spans[0], [])
        # The second one can join as soon as the first one listens; both load at the same time then.
        maddrs = first.wait_for("joined", START_TIMEOUT_S)["maddrs"]
        second = daemons.start("second", spans[1], maddrs)
        _import_client()
        first.wait_for("online", START_TIMEOUT_S)
    with progress.task(f"starting the second daemon, blocks {spans[1]}"):
        second.wait_for("online", START_TIMEOUT_S)
    with progress.task("joining as a client"):
        client = daemons.stack.enter_context(_connect(daemons.model, maddrs))
    answer(client, daemons.model, question, progress)
    progress.console.print(status_table(client, {first.peer_id: "first", second.peer_id: "second"}))


def answer(client: RemoteCausalLM, model: Path, question: str, progress: Progress) -> None:
    """Print the answer as its tokens come, and the speed."""
    from transformers import AutoTokenizer, TextStreamer

    from petalsd.cli.generate import MeteredStreamer

    tokenizer = AutoTokenizer.from_pretrained(model)
    messages = [{"role": "user", "content": question}]
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    streamer = MeteredStreamer(TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    progress.console.print(f"\n[bold]>[/bold] {question}\n")
    client.generate(encoded["input_ids"], max_new_tokens=MAX_NEW_TOKENS, do_sample=False, streamer=streamer)
    progress.console.print(f"\n[dim]{streamer.summary()}[/dim]\n")


def status_table(client: RemoteCausalLM, names: dict[str, str]) -> Table:
    """What the swarm knows of both daemons."""
    table = Table(title="the swarm", title_justify="left")
    for column in ("daemon", "peer", "state", "blocks", "dtype", "tokens/s of a block", "free cache tokens"):
        table.add_column(column, justify="right" if "token" in column else "left")
    for span in sorted(client.client.manager.spans, key=lambda span: span.span):
        record = span.record
        cache_tokens = (record.cache_tokens_left or 0) // (2 * len(span.span))
        table.add_row(
            names.get(span.peer, "?"),
            f"…{span.peer[-8:]}",
            f"[green]{record.state.name.lower()}[/green]",
            str(span.span),
            record.torch_dtype,
            f"{record.inference_rps or 0:,.0f}",
            f"{cache_tokens:,}",
        )
    return table


def _connect(model: Path, maddrs: list[str]) -> RemoteCausalLM:
    from petalsd.client.model import RemoteCausalLM

    return RemoteCausalLM.from_pretrained(model, initial_peers=maddrs, dht_prefix=PREFIX)


def _import_client() -> None:
    """The client's libraries take seconds to import; the daemons are busy with the same meanwhile."""
    with heavy_imports():
        import petalsd.client.model  # noqa: F401


def _say_stopped(progress: Progress) -> None:
    progress.console.print("  [green]✓[/green] both daemons are stopped")


if __name__ == "__main__":
    sys.exit(main())
