"""The rule by which a swarm balances itself, against a transcription of the reference's prose."""

from __future__ import annotations

import itertools
import random

import pytest

from petalsd.swarm.directory import RemoteSpan
from petalsd.swarm.placement import block_throughputs, choose_span, choose_start, should_move
from petalsd.swarm.protocol import ServerState
from petalsd.swarm.record import ServerRecord
from petalsd.types import BlockSpan


def servers(*spans: tuple[int, int, float]) -> list[RemoteSpan]:
    """Servers named a, b, c, ... of (start, end, throughput)."""
    return [
        RemoteSpan(name, BlockSpan(start, end), ServerRecord(ServerState.ONLINE, throughput))
        for name, (start, end, throughput) in zip("abcdefghij", spans, strict=False)
    ]


def moves(spans: list[RemoteSpan], peer: str, num_blocks: int, quality: float = 0.75) -> bool:
    return should_move(spans, peer, num_blocks, quality, random.Random(0))


def test_throughputs_add_up_per_block() -> None:
    """Each block has the sum of those who cover it; spans beyond the model are cut."""
    assert block_throughputs(servers((0, 2, 1.0), (1, 5, 2.0)), 3) == [1.0, 3.0, 2.0]


@pytest.mark.parametrize(
    ("throughputs", "length", "start"),
    [
        ([0.0, 0.0, 0.0], 2, 0),
        ([5.0, 0.0, 0.0, 5.0], 2, 1),
        ([1.0, 3.0, 1.0, 2.0], 2, 2),
        ([2.0, 2.0, 2.0], 3, 0),
        ([3.0, 1.0, 3.0, 1.0, 2.0], 2, 3),
    ],
)
def test_the_best_start_has_the_weakest_blocks(throughputs: list[float], length: int, start: int) -> None:
    """The window whose weakest block is weakest wins, then the second weakest, then the lowest start."""
    assert choose_start(throughputs, length) == start


def test_the_best_start_is_the_smallest_of_the_sorted_windows() -> None:
    """For all small throughput tables the choice is the minimum over windows of (sorted window, start)."""
    for table in itertools.product([0.0, 1.0, 2.0], repeat=5):
        for length in range(1, 6):
            windows = [(sorted(table[at : at + length]), at) for at in range(6 - length)]
            assert choose_start(table, length) == min(windows)[1]


def test_more_blocks_than_the_model_has_cannot_be_placed() -> None:
    """The refusal says how many there are."""
    with pytest.raises(ValueError, match="4 blocks among 3"):
        choose_start([0.0] * 3, 4)


def test_a_new_server_fills_the_gap() -> None:
    """The first choice covers what nobody serves; joining servers count like any other."""
    assert choose_span(servers((0, 4, 1.0), (6, 8, 1.0)), 8, 2) == BlockSpan(4, 6)


def test_a_server_moves_into_a_gap() -> None:
    """Two servers on the same blocks while others are bare: the swarm's weakest block gains, so one moves."""
    crowd = servers((0, 2, 1.0), (0, 2, 1.0))
    assert moves(crowd, "b", 4)


def test_nobody_moves_in_a_balanced_swarm() -> None:
    """Evenly covered blocks leave everyone where they are."""
    even = servers((0, 2, 1.0), (2, 4, 1.0), (0, 2, 1.0), (2, 4, 1.0))
    assert not any(moves(even, peer, 4) for peer in "abcd")


def test_the_only_holder_of_blocks_stays() -> None:
    """Leaving would break the chain."""
    assert not moves(servers((0, 2, 1.0), (2, 4, 9.0), (2, 4, 9.0)), "a", 4)


def test_a_small_gain_is_not_worth_a_move() -> None:
    """Moving needs today's weakest block below ``quality`` times what it could be."""
    skewed = servers((0, 2, 1.0), (0, 2, 1.0), (2, 4, 1.6))
    assert not moves(skewed, "b", 4, quality=0.5)


def test_quality_zero_never_moves_and_above_one_always() -> None:
    """The two ends of the knob."""
    crowd = servers((0, 2, 1.0), (0, 2, 1.0))
    assert not moves(crowd, "b", 4, quality=0.0)
    assert moves(crowd, "b", 4, quality=1.5)


def test_a_server_without_a_span_cannot_be_judged() -> None:
    """The caller must announce again first (checklist 22)."""
    with pytest.raises(ValueError, match="z has no span"):
        moves(servers((0, 2, 1.0)), "z", 4)


def test_the_others_places_are_left_alone() -> None:
    """The simulation works on copies: the spans given are as before."""
    crowd = servers((0, 2, 1.0), (0, 2, 1.0), (1, 3, 2.0))
    moves(crowd, "b", 6)
    assert [str(remote.span) for remote in crowd] == ["0:2", "0:2", "1:3"]


@pytest.mark.parametrize("seed", range(20))
def test_random_swarms_settle(seed: int) -> None:
    """Whatever the swarm, the answer comes and does not depend on the order in which servers are listed."""
    rng = random.Random(seed)
    crowd = servers(
        *((start := rng.randrange(10), start + rng.randrange(1, 7), rng.random() * 10) for _ in range(8))
    )
    answers = {should_move(order, "a", 16, 0.75, random.Random(1)) for order in (crowd, crowd[::-1])}
    assert len(answers) == 1
