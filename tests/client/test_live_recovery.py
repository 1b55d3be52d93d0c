"""A real server is killed in the middle of a generation: the output is the same as without."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from petalsd.client.cache import RemoteCache
from petalsd.client.model import RemoteCausalLM
from petalsd.client.options import ClientOptions
from tests.client.live_server import PREFIX, SLOW_RPS, ServerProcess, in_threads
from tests.tiny_models import make_tiny

pytestmark = [pytest.mark.swarm, pytest.mark.slow]

NEW_TOKENS = 20
# A lost server is noticed by its closed connection; a recovery that waits for this deadline fails the test.
OPTIONS = ClientOptions(request_timeout_s=600.0, max_step_tokens=8, refresh_period_s=5.0)


class AtToken(BaseStreamer):
    """Calls ``act`` when the ``count``-th new token has come."""

    def __init__(self, count: int, act: Callable[[], object]) -> None:
        self._left = count + 1
        self._act = act

    def put(self, value: torch.Tensor) -> None:
        self._left -= 1
        if self._left == 0:
            self._act()

    def end(self) -> None:
        """Nothing is left to do."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    path = tmp_path_factory.mktemp("tiny")
    return path, make_tiny("llama", path)


@contextlib.contextmanager
def doomed_server(path: Path, span: str, peer: str) -> Iterator[ServerProcess]:
    """A process that serves ``span`` and may be killed."""
    process = ServerProcess(path, span, peer)
    try:
        yield process
    finally:
        process.close()


def connect(path: Path, peer: str, options: ClientOptions = OPTIONS) -> RemoteCausalLM:
    return RemoteCausalLM.from_pretrained(path, initial_peers=[peer], dht_prefix=PREFIX, options=options)


def prompt(seed: int, tokens: int = 21) -> torch.Tensor:
    return torch.randint(1, 256, (1, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("lasting", "doomed", "spares"),
    [("2:4", "0:2", ["0:2"]), ("0:2", "2:4", ["1:4"]), ("0:1", "1:4", ["0:2", "2:3", "3:4"])],
    ids=["first-span", "last-span", "three-replace-one"],
)
def test_a_killed_server(
    tiny: tuple[Path, PreTrainedModel], lasting: str, doomed: str, spares: list[str]
) -> None:
    """Greedy generation goes on with other servers, token-exact, without waiting for a deadline."""
    path, reference = tiny
    ids = prompt(1)
    with (
        in_threads(path, lasting) as first,
        in_threads(path, *spares, peers=(first[0].maddr,), inference_rps=SLOW_RPS),
        doomed_server(path, doomed, first[0].maddr) as server,
        connect(path, first[0].maddr) as model,
        model.inference_session() as cache,
    ):
        killed_at: list[float] = []

        def kill() -> None:
            assert cache.session is not None
            assert server.peer in [hop.peer for hop in cache.session.route]
            killed_at.append(time.monotonic())
            server.kill()

        output = model.generate(
            ids,
            past_key_values=cache,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            streamer=AtToken(7, kill),
        )
        assert killed_at
        assert cache.session is not None
        assert server.peer not in [hop.peer for hop in cache.session.route]
    expected = reference.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert output.tolist() == expected.tolist()


def test_a_server_that_hangs(tiny: tuple[Path, PreTrainedModel]) -> None:
    """Its connections stay open, but it answers no pings either: another server takes its place."""
    path, reference = tiny
    ids = prompt(7)
    with (
        in_threads(path, "0:2") as first,
        in_threads(path, "1:4", peers=(first[0].maddr,), inference_rps=SLOW_RPS),
        doomed_server(path, "2:4", first[0].maddr) as server,
        connect(path, first[0].maddr, replace(OPTIONS, silence_s=1.0)) as model,
        model.inference_session() as cache,
    ):
        output = model.generate(
            ids,
            past_key_values=cache,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            streamer=AtToken(7, server.freeze),
        )
        assert cache.session is not None
        assert server.peer not in [hop.peer for hop in cache.session.route]
    expected = reference.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert output.tolist() == expected.tolist()


def test_a_server_killed_after_a_rollback(tiny: tuple[Path, PreTrainedModel]) -> None:
    """What was rolled back is not fed to the replacement."""
    path, reference = tiny
    with (
        in_threads(path, "0:2") as first,
        in_threads(path, "0:4", peers=(first[0].maddr,), inference_rps=SLOW_RPS),
        doomed_server(path, "2:4", first[0].maddr) as server,
        connect(path, first[0].maddr) as model,
        model.inference_session(max_tokens=80) as cache,
    ):
        before = model.generate(prompt(2), past_key_values=cache, max_new_tokens=10, do_sample=False)
        cache.position = 15
        branch = torch.cat([before[:, :15], prompt(3, tokens=5)], dim=1)
        output = model.generate(
            branch,
            past_key_values=cache,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            streamer=AtToken(4, server.kill),
        )
    expected = reference.generate(branch, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert output.tolist() == expected.tolist()


def test_a_server_killed_during_beam_search(
    tiny: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All beams go on with their own past."""
    path, reference = tiny
    ids = prompt(4, tokens=6)
    settings = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    with (
        in_threads(path, "2:4") as first,
        in_threads(path, "0:3", peers=(first[0].maddr,), inference_rps=SLOW_RPS),
        doomed_server(path, "0:2", first[0].maddr) as server,
        connect(path, first[0].maddr) as model,
    ):
        steps = 0
        step = RemoteCache.step

        def kill_before_step_six(cache: RemoteCache, *step_arguments: Any) -> torch.Tensor:
            nonlocal steps
            steps += 1
            if steps == 6:
                server.kill()
            return step(cache, *step_arguments)

        monkeypatch.setattr(RemoteCache, "step", kill_before_step_six)
        output = model.generate(ids, **settings)
    assert steps > 6
    assert output.tolist() == reference.generate(ids, **settings).tolist()


def test_a_client_waits_for_a_gap_to_close(tiny: tuple[Path, PreTrainedModel]) -> None:
    """With nobody else serving the blocks, generation goes on when somebody comes."""
    path, reference = tiny
    ids = prompt(5)
    with (
        in_threads(path, "0:2") as first,
        doomed_server(path, "2:4", first[0].maddr) as server,
        contextlib.ExitStack() as later,
        connect(path, first[0].maddr) as model,
    ):

        def replace() -> None:
            server.kill()
            later.enter_context(in_threads(path, "1:4", peers=(first[0].maddr,)))

        output = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, streamer=AtToken(5, replace))
    expected = reference.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert output.tolist() == expected.tolist()


def test_our_own_node_killed(tiny: tuple[Path, PreTrainedModel]) -> None:
    """The client's libp2p daemon dies: it is started anew and the generation goes on."""
    path, reference = tiny
    ids = prompt(6)
    with in_threads(path, "0:4") as first, connect(path, first[0].maddr) as model:

        def kill_node() -> None:
            child = model.client.node._daemon._child
            assert child is not None
            child.kill()

        output = model.generate(
            ids, max_new_tokens=NEW_TOKENS, do_sample=False, streamer=AtToken(5, kill_node)
        )
    expected = reference.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert output.tolist() == expected.tolist()
