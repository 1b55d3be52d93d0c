"""Simulates swarms and writes benchmarks/results/swarm_sim.csv and docs/benchmarks/placement.svg.

    python -m benchmarks.swarm_sim [--case 405b/100 ...] [--policy petalsd petals petalsd+petals]
                                   [--seeds N] [--first-seed 100] [--print-only]
    python -m benchmarks.swarm_sim --decisions

Without options: all cases, which takes an hour and a half. docs/placement.md says what is simulated.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.benchmark import say
from benchmarks.swarm_sim.cases import CASES, Case, find_case, make_policies
from benchmarks.swarm_sim.decisions import slowest_decision_ms
from benchmarks.swarm_sim.fleet import draw_fleet
from benchmarks.swarm_sim.results import print_table, publish, summarize
from benchmarks.swarm_sim.simulation import Ceiling, Outcome, Simulation

# Seeds below were used to choose the constants of the rule.
FIRST_SEED = 100


def main() -> int:
    options = parse_arguments()
    if options.decisions:
        for servers in (64, 100, 1000, 10_000):
            print(f"{servers} servers: {slowest_decision_ms('405b', servers):.1f} ms the slowest decision")
        return 0
    try:
        cases = [find_case(name) for name in options.case] or CASES
        for name in options.policy:
            make_policies(name)
    except ValueError as error:
        sys.exit(f"swarm_sim: {error}")
    for case in cases:
        outcomes = run_case(case, options.policy or case.policies, options.first_seed, options.seeds)
        summaries = summarize(outcomes)
        print_table(summaries)
        if not options.print_only:
            publish(summaries)
    return 0


def run_case(case: Case, policies: list[str], first_seed: int, seeds: int | None) -> list[Outcome]:
    """All policies on the same fleets."""
    outcomes = []
    for seed in range(first_seed, first_seed + (seeds or case.seeds)):
        ceiling = Ceiling(case.scenario, draw_fleet(case.scenario, seed), seed)
        for name in policies:
            outcome = Simulation(case.scenario, make_policies(name), seed, name, ceiling).run()
            say(f"{case.name} seed {seed} {name}: {outcome.share:.3f}")
            outcomes.append(outcome)
    return outcomes


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.swarm_sim", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--case", nargs="+", default=[], metavar="MODEL/SERVERS")
    parser.add_argument("--policy", nargs="+", default=[], help="petalsd, petals, petals-still, or a+b mixed")
    parser.add_argument("--seeds", type=int, help="how many; each case has a number of its own")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--print-only", action="store_true", help="leave the files of results alone")
    parser.add_argument("--decisions", action="store_true", help="time single decisions instead")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
