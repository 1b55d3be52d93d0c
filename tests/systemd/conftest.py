"""A systemd for each module of tests, with petalsd installed in it and a tiny model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.conftest import FIGURE
from tests.systemd.installation import binds, install
from tests.systemd.instances import Instance, maddr_of
from tests.systemd.journal import Journal
from tests.systemd.lab import Lab, missing
from tests.tiny_models import make_tiny, make_tokenizer

MODEL = "/srv/models/tiny"

MakeInstance = Callable[..., Instance]
Figure = Callable[[str, float], None]


@pytest.fixture(scope="session")
def able() -> None:
    """Skips where there can be no lab."""
    if reason := missing():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def tiny_path(able: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models") / "tiny"


@pytest.fixture(scope="session")
def tiny(tiny_path: Path) -> PreTrainedModel:
    """The same model in one process."""
    model = make_tiny("llama", tiny_path)
    make_tokenizer(tiny_path)
    return model


@pytest.fixture(scope="module")
def lab(tiny: PreTrainedModel, tiny_path: Path) -> Iterator[Lab]:
    """The tests' own threads and p2p nodes live in its network."""
    with Lab(binds()) as lab, lab.network():
        install(lab)
        lab.copy(tiny_path, MODEL)
        yield lab


@pytest.fixture(scope="module")
def journal(lab: Lab) -> Iterator[Journal]:
    with lab.following() as journal:
        yield journal


@pytest.fixture(scope="module")
def instance(lab: Lab, journal: Journal) -> MakeInstance:
    """Makes instances with ports of their own."""
    made: list[Instance] = []

    def make(name: str) -> Instance:
        made.append(Instance(lab, journal, name, len(made)))
        return made[-1]

    return make


@pytest.fixture(scope="module")
def demo(instance: MakeInstance) -> Iterator[Instance]:
    """``petalsd@demo``, configured; the tests start it, and may leave it running."""
    demo = instance("demo")
    demo.configure(MODEL)
    yield demo
    demo.stop()


@pytest.fixture(scope="module")
def maddr(demo: Instance) -> str:
    """Where the demo listens, started."""
    return maddr_of(demo.start())


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Figure:
    """Notes a measured time, shown at the end of the run; it travels with the test's report, from workers too."""

    def note(what: str, seconds: float) -> None:
        request.node.user_properties.append((FIGURE, f"{what:<70} {seconds:6.2f} s"))

    return note
