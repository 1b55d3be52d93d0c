"""The control socket of an installed service: a hundred wrong requests, and users who may only read."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.control.double import Answer, ask, parse, send
from tests.control.hostile import BAD_FIELDS, NO_HTTP, NO_JSON, TOO_LARGE, WRONG_PLACE, get, post
from tests.systemd.clients import PROMPT, generate, greedy
from tests.systemd.instances import Instance
from tests.systemd.lab import Lab

pytestmark = [pytest.mark.systemd, pytest.mark.swarm, pytest.mark.slow, pytest.mark.timeout(180)]

STRANGER = "games"  # a user of every Debian, with a group of the same name
SLOW = [b"", b"GET /v1/sta", get("/v1/status")[:-2], post("/v1/drain", b'{"wai', 30)]


@pytest.fixture
def socket(lab: Lab, demo: Instance, maddr: str) -> Path:
    return lab.path(f"/run/petalsd/{demo.name}/control.sock")


@pytest.fixture(autouse=True)
def unharmed(demo: Instance, maddr: str, tiny: PreTrainedModel, tiny_path: Path) -> Iterator[None]:
    """After each: the same process serves, nothing is wrong, a client generates."""
    pid = demo.pid
    yield
    assert (demo.pid, demo.ctl("status")["state"], demo.warnings()) == (pid, "online", {})
    assert generate(tiny_path, maddr, 4) == greedy(tiny, PROMPT, 4)


async def raw(socket: Path, data: bytes) -> Answer:
    return parse(await send(socket, data, is_open=True))


async def test_a_hundred_wrong_requests(socket: Path) -> None:
    """Each gets its error; then those that never finish, all at once, and are told so."""
    assert [(await raw(socket, data)).status for data in NO_HTTP] == [400] * len(NO_HTTP)
    for data, status in WRONG_PLACE:
        assert (await raw(socket, data)).status == status, data
    assert [(await ask(socket, "POST", "/v1/drain", body)).status for body in NO_JSON] == [400] * len(NO_JSON)
    for target, body, field in BAD_FIELDS:
        answer = await ask(socket, "POST", target, body)
        assert (answer.status, answer.json["error"]["code"]) == (400, "bad_request"), field
    for target, large in TOO_LARGE:
        assert (await ask(socket, "POST", target, large)).status == 413
    late = await asyncio.gather(*(raw(socket, data) for data in SLOW))
    assert [answer.status for answer in late] == [408] * len(SLOW)


def test_other_users_read_and_do_not_act(lab: Lab, demo: Instance, socket: Path) -> None:
    """petalsctl shows a stranger the status, refuses to steer, and says who may and how to become one.

    The doctor takes directories that are closed to a stranger for no problem of the service.
    """
    words = ["petalsctl", "-i", demo.name]
    assert lab.run([*words, "status"], user=STRANGER).stdout.startswith("● demo is online")
    for verb in (["drain"], ["resume"], ["rebalance"], ["reload"]):
        refused = lab.run([*words, *verb], user=STRANGER, check=False)
        assert refused.returncode == 4
        assert "only for root and the daemon's own user, and the group petalsd" in refused.stderr
        assert f"sudo petalsctl -i {demo.name} {verb[0]}; or join its group: sudo usermod -aG petalsd" in (
            " ".join(refused.stderr.split())
        )
    doctor = lab.run([*words, "doctor"], user=STRANGER).stdout
    assert "\nok    disk " in doctor, doctor
    assert "\nfail " not in doctor, doctor
    assert lab.run([*words, "resume"], user="petalsd").stdout == "serving again\n"
