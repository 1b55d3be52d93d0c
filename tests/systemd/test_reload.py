"""`systemctl reload` and SIGHUP under load, with a configuration that is the same, wrong, or another one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.systemd.clients import Generation, connect, greedy
from tests.systemd.conftest import MODEL
from tests.systemd.instances import Instance
from tests.systemd.lab import Lab

pytestmark = [pytest.mark.systemd, pytest.mark.swarm, pytest.mark.slow, pytest.mark.timeout(180)]

NUM_TOKENS, HOLD_AT = 24, 8
PROMPT = torch.tensor([[7, 2, 40]])
WRONG = f'[model]\nsource = "{MODEL}"\n[blocks]\nspam = 3\n'
SENTENCE = "unknown key blocks.spam; did you mean blocks.span?"


@pytest.fixture
def generation(maddr: str, tiny_path: Path) -> Iterator[Generation]:
    """In the middle, and held there."""
    with connect(tiny_path, maddr) as client, ThreadPoolExecutor(1) as pool:
        generation = Generation(pool, client, PROMPT, NUM_TOKENS, HOLD_AT)
        generation.wait_held()
        yield generation
        generation.release()


@pytest.fixture
def undisturbed(demo: Instance, generation: Generation, tiny: PreTrainedModel) -> Iterator[None]:
    """After the test: the same process serves, and the generation comes to its end as if nothing had been."""
    pid = demo.pid
    yield
    generation.release()
    assert generation.tokens() == greedy(tiny, PROMPT, NUM_TOKENS)
    assert (demo.pid, demo.show("ActiveState")) == (pid, "active")


@pytest.mark.usefixtures("undisturbed")
def test_the_same_configuration_changes_nothing(lab: Lab, demo: Instance) -> None:
    """By systemd and by signal; the journal says that the placement was looked at."""
    for ask in (lambda: lab.systemctl("reload", demo.unit), lambda: demo.signal("SIGHUP")):
        since_s = demo.journal.mark()
        ask()
        demo.event("placement_unchanged", since_s)


@pytest.mark.usefixtures("undisturbed")
def test_a_wrong_configuration_is_refused_whole(lab: Lab, demo: Instance) -> None:
    """systemd's reload fails with the sentence in the journal; the warning stays until the file is right again."""
    demo.write_config(WRONG)
    since_s = demo.journal.mark()
    assert lab.systemctl("reload", demo.unit, check=False).returncode != 0
    refused = demo.event("reload_refused", since_s)
    assert f"/etc/petalsd/demo.toml: {SENTENCE}" in refused["error"]
    demo.text("Reload failed for", since_s)
    assert SENTENCE in demo.warnings()["reload_refused"]
    since_s = demo.journal.mark()
    demo.signal("SIGHUP")
    demo.event("reload_refused", since_s)

    demo.configure(MODEL)
    lab.systemctl("reload", demo.unit)
    demo.event("warning_cleared", since_s, code="reload_refused")
    assert demo.warnings() == {}


@pytest.mark.usefixtures("undisturbed")
def test_changes_that_touch_no_block_are_applied_while_sessions_go_on(lab: Lab, demo: Instance) -> None:
    """What can be changed now is; what needs a restart is named, in a warning, until the file is as it was."""
    demo.configure(MODEL, daemon={"drain_deadline_s": 5.0}, engine={"max_sessions": 3})
    since_s = demo.journal.mark()
    lab.systemctl("reload", demo.unit)
    reloaded = demo.event("reloaded", since_s)
    assert reloaded["applied"] == '["daemon.drain_deadline_s"]'
    assert reloaded["needs_restart"] == '["engine.max_sessions"]'
    assert "engine.max_sessions" in demo.warnings()["restart_needed"]
    demo.configure(MODEL)
    lab.systemctl("reload", demo.unit)
    assert demo.warnings() == {}


def test_another_span_is_moved_to(lab: Lab, demo: Instance, generation: Generation) -> None:
    """The blocks that stay serve on, and are not loaded again; a session on others has the time of a drain."""
    since_s = demo.journal.mark()
    demo.configure(MODEL, blocks={"span": "1:4"}, daemon={"drain_deadline_s": 1.0})
    lab.systemctl("reload", demo.unit)
    assert demo.event("moving", since_s)["new"] == "1:4"
    assert demo.event("moved", since_s)["old"] == "0:4"
    assert demo.event("span_loaded", since_s)["kept_blocks"] == "3"
    generation.release()
    assert "the server moved to blocks 1:4" in str(generation.error())
    assert demo.ctl("status")["span"] == {"start": 1, "end": 4}
