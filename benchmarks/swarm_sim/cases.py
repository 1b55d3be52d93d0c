"""What is simulated: swarms of several sizes, alone or mixed with stock Petals servers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.swarm_sim.fleet import MODELS, Scenario
from benchmarks.swarm_sim.policies import PetalsdPolicy, PetalsPolicy, Policy

POLICIES: dict[str, Callable[[], Policy]] = {
    "petalsd": PetalsdPolicy,
    "petals": PetalsPolicy,
    "petals-still": lambda: PetalsPolicy(quality=0.0),
}


@dataclass(frozen=True, slots=True)
class Case:
    """A model and a number of servers; ``seeds`` are how many are simulated by default."""

    model: str
    servers: int
    seeds: int
    policies: Sequence[str]

    @property
    def name(self) -> str:
        return f"{self.model}/{self.servers}"

    @property
    def scenario(self) -> Scenario:
        return Scenario(model=self.model, servers=self.servers)


# Stock Petals' rule takes minutes where hundreds of servers imagine everybody's moving.
CASES = [
    Case("70b", 10, 12, ("petalsd", "petals")),
    Case("405b", 30, 12, ("petalsd", "petals", "petalsd+petals")),
    Case("70b", 100, 4, ("petalsd", "petals")),
    Case("405b", 100, 2, ("petalsd", "petalsd+petals")),
    Case("405b", 300, 2, ("petalsd",)),
    Case("405b", 1000, 1, ("petalsd",)),
]


def find_case(name: str) -> Case:
    """One of CASES, or model/servers with two seeds; ValueError for a model that is not known."""
    for case in CASES:
        if case.name == name:
            return case
    model, _, servers = name.partition("/")
    if model not in MODELS or not servers.isdigit() or int(servers) == 0:
        raise ValueError(f"a case is model/servers with a model of {', '.join(MODELS)}, got {name!r}")
    return Case(model, int(servers), 2, ("petalsd", "petals"))


def make_policies(name: str) -> list[Policy]:
    """``petalsd``, or ``petalsd+petals`` for a mixed swarm; ValueError for others."""
    unknown = [part for part in name.split("+") if part not in POLICIES]
    if unknown:
        raise ValueError(f"no policy {unknown[0]!r}: there are {', '.join(POLICIES)}")
    return [POLICIES[part]() for part in name.split("+")]
