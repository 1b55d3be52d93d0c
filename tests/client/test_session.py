"""InferenceSession over servers in memory: whatever fails, the outputs are those of an undisturbed run."""

from __future__ import annotations

import asyncio

import pytest
import torch

from petalsd.client.options import ClientOptions
from petalsd.client.session import InferenceSession
from petalsd.client.span_session import StreamTerms
from petalsd.errors import BadRequest, MissingBlocks, RemoteFailure, SessionClosed
from petalsd.swarm.codec import decode_metadata, encode_metadata
from petalsd.types import BlockSpan
from tests.client.fake_swarm import (
    HIDDEN,
    FakeServer,
    FakeSwarm,
    dies_at,
    make_span,
    refuses_at,
    run_blocks,
)

BLOCKS = BlockSpan(0, 6)
QUICK = ClientOptions(
    min_backoff_s=0.001, max_backoff_s=0.002, recovery_timeout_s=5.0, max_failures=4, max_step_tokens=8
)


def make_session(
    swarm: FakeSwarm, max_tokens: int = 64, options: ClientOptions = QUICK, blocks: BlockSpan = BLOCKS
) -> InferenceSession:
    return InferenceSession(swarm, swarm, StreamTerms("tiny", max_tokens, options), blocks)


def random_states(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


async def run_steps(session: InferenceSession, hidden: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    outputs = [await session.step(piece) for piece in hidden.split(sizes, dim=1)]
    return torch.cat(outputs, dim=1)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def two_halves() -> tuple[FakeServer, FakeServer]:
    return FakeServer(make_span("a", 0, 3)), FakeServer(make_span("b", 3, 6))


async def test_steps_equal_one_pass() -> None:
    """Prefill and decoding through two servers give what all blocks over the whole sequence give."""
    swarm = FakeSwarm(*two_halves())
    hidden = random_states(2, 12)
    async with make_session(swarm) as session:
        output = await run_steps(session, hidden, (9, 1, 2))
        assert session.position == 12
    assert_same(output, run_blocks(BLOCKS, hidden))
    assert swarm.open_streams == 0


async def test_messages_have_the_form_that_stock_servers_want() -> None:
    """Metadata, dummies, uids and ids of first and later messages."""
    swarm = FakeSwarm(*two_halves())
    async with make_session(swarm) as session:
        await run_steps(session, random_states(1, 4), (3, 1))
    first, later = swarm.servers["b"].messages
    assert first.uid == "tiny.3 tiny.4 tiny.5"
    assert first.metadata["max_length"] == 64
    assert (first.metadata["start_from_position"], later.metadata["start_from_position"]) == (0, 3)
    on_the_wire = decode_metadata(encode_metadata(first.metadata))
    assert on_the_wire["args_structure"] == ((b"__T0", b"__T1", b"__T2"), {})
    assert "max_length" not in later.metadata
    assert first.metadata["session_id"] == later.metadata["session_id"]
    assert first.metadata["step_id"] != later.metadata["step_id"]
    assert first.hypo_ids.dtype == torch.int64 and first.prompts.shape == (0,)
    assert first.metadata["session_id"] != swarm.servers["a"].messages[0].metadata["session_id"]


async def test_a_long_prefill_is_sent_in_pieces_below_the_limit() -> None:
    """No message holds more rows × tokens than the options allow, and the result is that of one step."""
    swarm = FakeSwarm(*two_halves())
    hidden = random_states(2, 23)
    for server in swarm.servers.values():
        server.max_step_tokens = QUICK.max_step_tokens
    async with make_session(swarm) as session:
        output = await session.step(hidden)
    assert_same(output, run_blocks(BLOCKS, hidden))
    assert [message.hidden.shape[1] for message in swarm.servers["a"].messages] == [4, 4, 4, 4, 4, 3]


@pytest.mark.parametrize("step", [1, 2, 5])
@pytest.mark.parametrize("lost", ["a", "b"])
async def test_a_lost_server_is_replaced_exactly(lost: str, step: int) -> None:
    """Whichever server dies, at the first, an early or a late step: the outputs do not change."""
    servers = two_halves()
    swarm = FakeSwarm(*servers, FakeServer(make_span("spare", 0, 6)))
    swarm.servers[lost].before_step = dies_at(step)
    hidden = random_states(1, 9)
    async with make_session(swarm) as session:
        output = await run_steps(session, hidden, (3, 1, 1, 2, 1, 1))
        assert lost not in [hop.peer for hop in session.route]
    assert_same(output, run_blocks(BLOCKS, hidden))
    assert swarm.open_streams <= 1  # the dead server's own count
    assert swarm.servers["spare"].messages[0].metadata["start_from_position"] == 0


async def test_several_servers_may_replace_one() -> None:
    """Each of the replacing spans is fed the whole output of the one before."""
    whole = FakeServer(make_span("whole", 0, 6), before_step=dies_at(4))
    parts = [FakeServer(make_span(f"part{i}", 2 * i, 2 * i + 2)) for i in range(3)]
    swarm = FakeSwarm(whole, *parts)
    hidden = random_states(1, 20)
    async with make_session(swarm) as session:
        output = await run_steps(session, hidden, (7, 1, 10, 1, 1))
        assert [hop.peer for hop in session.route] == ["part0", "part1", "part2"]
    assert_same(output, run_blocks(BLOCKS, hidden))


async def test_a_replacement_that_dies_while_it_is_fed_is_replaced_too() -> None:
    """Recovery is itself recovered from."""
    whole = FakeServer(make_span("whole", 0, 6), before_step=dies_at(3))
    half = FakeServer(make_span("x_half", 0, 4), before_step=dies_at(2))
    swarm = FakeSwarm(
        whole,
        half,
        FakeServer(make_span("y", 0, 2)),
        FakeServer(make_span("z", 2, 5)),
        FakeServer(make_span("zz", 5, 6)),
    )
    hidden = random_states(1, 30)
    async with make_session(swarm) as session:
        output = await run_steps(session, hidden, (8, 8, 12, 1, 1))
    assert_same(output, run_blocks(BLOCKS, hidden))


async def test_every_new_stream_has_a_fresh_session_id() -> None:
    """The same server may be used again; to it, the new stream is another session."""
    server = FakeServer(make_span("only", 0, 6), before_step=refuses_at(2, "engine_error: once"))
    swarm = FakeSwarm(server)
    swarm.on_refresh = swarm.failures.clear
    async with make_session(swarm) as session:
        await run_steps(session, random_states(1, 4), (2, 1, 1))
    ids = [message.metadata["session_id"] for message in server.messages]
    assert ids[0] == ids[1] != ids[2] == ids[3]


async def test_rollback_forgets_what_came_after() -> None:
    """After ``position = p`` the next steps follow the first p tokens."""
    swarm = FakeSwarm(*two_halves())
    hidden, other = random_states(1, 8), random_states(1, 3, seed=1)
    async with make_session(swarm) as session:
        await run_steps(session, hidden, (6, 1, 1))
        session.position = 5
        output = await run_steps(session, other, (2, 1))
    assert_same(output, run_blocks(BLOCKS, torch.cat([hidden[:, :5], other], dim=1))[:, 5:])
    assert swarm.servers["a"].messages[3].metadata["start_from_position"] == 5


@pytest.mark.parametrize("lost", ["a", "b"])
async def test_a_loss_after_a_rollback_is_recovered_exactly(lost: str) -> None:
    """What was rolled back is not fed to the replacement."""
    swarm = FakeSwarm(*two_halves(), FakeServer(make_span("spare", 0, 6)))
    hidden, other = random_states(1, 8), random_states(1, 4, seed=1)
    async with make_session(swarm) as session:
        await run_steps(session, hidden, (6, 2))
        session.position = 3
        first = await session.step(other[:, :2])
        swarm.servers[lost].is_alive = False
        rest = await session.step(other[:, 2:])
    whole = torch.cat([hidden[:, :3], other], dim=1)
    assert_same(torch.cat([first, rest], dim=1), run_blocks(BLOCKS, whole)[:, 3:])


@pytest.mark.parametrize("version", ["2.2.0.post1", None])
async def test_rollback_on_servers_that_ignore_it_feeds_a_new_stream(version: str | None) -> None:
    """Stock servers before 2.3 would silently append; they get a fresh stream instead."""
    server = FakeServer(make_span("old", 0, 6, version=version))
    swarm = FakeSwarm(server)
    hidden, other = random_states(1, 6), random_states(1, 1, seed=1)
    async with make_session(swarm) as session:
        await session.step(hidden)
        session.position = 4
        output = await session.step(other)
        assert server.open_streams == 1
    assert_same(output, run_blocks(BLOCKS, torch.cat([hidden[:, :4], other], dim=1))[:, 4:])
    starts = [message.metadata["start_from_position"] for message in server.messages]
    assert starts == [0, 0] and swarm.failures == []


@pytest.mark.parametrize("version", ["2.3.0+petalsd", "2.3.0.dev2"])
async def test_rows_follow_their_hypotheses(version: str) -> None:
    """hypo_ids reorder all caches; servers that cannot are fed again."""
    servers = [FakeServer(make_span("a", 0, 3, version=version)), FakeServer(make_span("b", 3, 6))]
    swarm = FakeSwarm(*servers)
    hidden, more = random_states(3, 5), random_states(3, 2, seed=1)
    async with make_session(swarm) as session:
        await session.step(hidden)
        first = await session.step(more[:, :1], hypo_ids=(2, 0, 0))
        last = await session.step(more[:, 1:], hypo_ids=(1, 1, 2))
    order = [[2, 0, 0][j] for j in (1, 1, 2)]
    lived = torch.cat([hidden[[2, 0, 0]], more[:, :1]], dim=1)
    assert_same(first, run_blocks(BLOCKS, lived)[:, 5:])
    ended = torch.cat([hidden[order], more[[1, 1, 2], :1], more[:, 1:]], dim=1)
    assert_same(last, run_blocks(BLOCKS, ended)[:, 6:])


@pytest.mark.parametrize("lost", ["a", "b"])
async def test_a_loss_during_beam_search_is_recovered_exactly(lost: str) -> None:
    """The replacement is fed rows in their present order, also when the reordering step itself fails."""
    swarm = FakeSwarm(*two_halves(), FakeServer(make_span("spare", 0, 6)))
    hidden, more = random_states(2, 4), random_states(2, 3, seed=1)
    async with make_session(swarm) as session:
        await session.step(hidden)
        await session.step(more[:, :1], hypo_ids=(1, 0))
        swarm.servers[lost].is_alive = False
        await session.step(more[:, 1:2], hypo_ids=(0, 0))
        output = await session.step(more[:, 2:])
    past = torch.cat([hidden[[1, 0]], more[:, :1]], dim=1)[[0, 0]]
    assert_same(output, run_blocks(BLOCKS, torch.cat([past, more[:, 1:]], dim=1))[:, -1:])


@pytest.mark.parametrize("rows", [1, 2])
async def test_prompts_are_part_of_what_is_fed_again(rows: int) -> None:
    """Deep prompts of the first step reach the replacements too, cut by block and by piece."""
    whole = FakeServer(make_span("whole", 0, 6), before_step=dies_at(5))
    swarm = FakeSwarm(whole, FakeServer(make_span("x", 0, 4)), FakeServer(make_span("y", 4, 6)))
    hidden, prompts = random_states(2, 13), torch.randn(6, rows, 7, HIDDEN)
    async with make_session(swarm) as session:
        outputs = [await session.step(hidden[:, :11], prompts=prompts)]
        outputs += [await session.step(hidden[:, i : i + 1]) for i in (11, 12)]
        assert [hop.peer for hop in session.route] == ["x", "y"]
    assert_same(torch.cat(outputs, dim=1), run_blocks(BLOCKS, hidden, prompts))


async def test_retries_are_bounded() -> None:
    """A swarm where every server fails ends in the last server's error after as many failures as allowed."""
    swarm = FakeSwarm(*(FakeServer(make_span(f"s{i}", 0, 6), before_step=dies_at(1)) for i in range(9)))
    async with make_session(swarm) as session:
        with pytest.raises(RemoteFailure, match="closed the stream"):
            await session.step(random_states(1, 2))
    assert sum(len(server.messages) for server in swarm.servers.values()) == QUICK.max_failures + 1


async def test_a_session_waits_for_missing_blocks() -> None:
    """A gap in the swarm is waited for; the step goes on when somebody serves it, earlier tokens included."""
    servers = two_halves()
    swarm = FakeSwarm(*servers)
    hidden = random_states(1, 5)
    async with make_session(swarm) as session:
        first = await session.step(hidden[:, :3])
        servers[1].is_alive = False

        def someone_comes() -> None:
            if swarm.refreshes == 3:
                swarm.servers["new"] = FakeServer(make_span("new", 2, 6))

        swarm.on_refresh = someone_comes
        rest = await session.step(hidden[:, 3:])
    assert_same(torch.cat([first, rest], dim=1), run_blocks(BLOCKS, hidden))


async def test_missing_blocks_are_not_waited_for_for_ever() -> None:
    """The wait ends with the error that names the blocks."""
    options = ClientOptions(min_backoff_s=0.001, max_backoff_s=0.001, recovery_timeout_s=0.05)
    async with make_session(FakeSwarm(two_halves()[0]), options=options) as session:
        with pytest.raises(MissingBlocks, match="3"):
            await session.step(random_states(1, 1))


async def test_a_cancelled_step_leaves_the_session_usable() -> None:
    """An interrupted step counts as not done; the next one gives the right result."""
    servers = two_halves()
    swarm = FakeSwarm(*servers)
    hidden = random_states(1, 6)
    async with make_session(swarm) as session:
        await session.step(hidden[:, :4])
        task = asyncio.ensure_future(session.step(random_states(1, 2, seed=9)))
        servers[1].before_step = lambda server, number: [task.cancel()].clear()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert session.position == 4
        output = await session.step(hidden[:, 4:])
    assert_same(output, run_blocks(BLOCKS, hidden)[:, 4:])
    assert swarm.open_streams == 0


async def test_a_step_of_no_tokens_reaches_every_server() -> None:
    """It reserves the caches before there is anything to compute."""
    swarm = FakeSwarm(*two_halves())
    async with make_session(swarm) as session:
        assert (await session.step(torch.zeros(2, 0, HIDDEN))).shape == (2, 0, HIDDEN)
        assert [len(server.messages) for server in swarm.servers.values()] == [1, 1]
        hidden = random_states(2, 3)
        assert_same(await session.step(hidden), run_blocks(BLOCKS, hidden))


async def test_worn_streams_are_renewed_before_the_server_ends_them() -> None:
    """A stream that was idle too long is not the server's failure: the same server goes on."""
    options = ClientOptions(max_idle_s=-1.0)
    server = FakeServer(make_span("a", 0, 6))
    swarm = FakeSwarm(server)
    hidden = random_states(1, 3)
    async with make_session(swarm, options=options) as session:
        output = await run_steps(session, hidden, (1, 1, 1))
        assert server.open_streams == 1
    assert_same(output, run_blocks(BLOCKS, hidden))
    assert len({message.metadata["session_id"] for message in server.messages}) == 3


async def test_a_part_of_the_blocks_can_be_driven() -> None:
    """A session over a sub-range uses absolute block numbers on the wire and in prompts."""
    swarm = FakeSwarm(*two_halves())
    hidden, prompts = random_states(1, 4), torch.randn(3, 1, 2, HIDDEN)
    async with make_session(swarm, blocks=BlockSpan(2, 5)) as session:
        output = await session.step(hidden, prompts=prompts)
    assert [server.messages[0].uid for server in swarm.servers.values()] == ["tiny.2", "tiny.3 tiny.4"]
    assert_same(output, run_blocks(BlockSpan(2, 5), hidden, prompts))


async def test_the_output_has_the_callers_dtype() -> None:
    """Servers may answer in another dtype; only the last output is cast."""
    swarm = FakeSwarm(*two_halves())
    async with make_session(swarm) as session:
        output = await session.step(random_states(1, 2).to(torch.float64).to(torch.float32))
    assert output.dtype == torch.float32


@pytest.mark.parametrize(
    ("tensors", "field"),
    [
        ({"hidden": torch.zeros(1, HIDDEN)}, "hidden"),
        ({"hidden": torch.zeros(0, 1, HIDDEN)}, "hidden"),
        ({"hidden": torch.zeros(1, 65, HIDDEN)}, "64 tokens"),
        ({"hidden": torch.zeros(1, 2, HIDDEN), "prompts": torch.zeros(5, 1, 1, HIDDEN)}, "prompts"),
        ({"hidden": torch.zeros(1, 2, HIDDEN), "prompts": torch.zeros(6, 1, 3, HIDDEN)}, "prompts"),
        ({"hidden": torch.zeros(2, 2, HIDDEN), "hypo_ids": (0, 2)}, "hypo_ids"),
        ({"hidden": torch.zeros(2, 2, HIDDEN), "hypo_ids": (0,)}, "hypo_ids"),
    ],
)
async def test_a_wrong_step_is_refused_before_anything_is_sent(
    tensors: dict[str, torch.Tensor], field: str
) -> None:
    """The error names the argument; no server hears of it."""
    swarm = FakeSwarm(*two_halves())
    async with make_session(swarm) as session:
        with pytest.raises(BadRequest, match=field):
            await session.step(**tensors)
    assert not any(server.messages for server in swarm.servers.values())


async def test_the_batch_is_fixed_by_the_first_step() -> None:
    """Servers reserve their caches for it."""
    async with make_session(FakeSwarm(*two_halves())) as session:
        await session.step(random_states(2, 1))
        with pytest.raises(BadRequest, match=r"\[2, n, M\]"):
            await session.step(random_states(1, 1))


async def test_positions_ahead_and_closed_sessions_are_refused() -> None:
    """A session rolls back only, and ends once."""
    session = make_session(FakeSwarm(*two_halves()))
    await session.step(random_states(1, 3))
    for position in (4, -1):
        with pytest.raises(BadRequest, match="position"):
            session.position = position
    await session.close()
    await session.close()
    with pytest.raises(SessionClosed):
        await session.step(random_states(1, 1))


async def test_steps_are_replayed_as_they_came_where_rotation_depends_on_length() -> None:
    """With dynamic or longrope rotation a merged or cut step would give other numbers."""
    whole = FakeServer(make_span("whole", 0, 6), before_step=dies_at(5))
    spare = FakeServer(make_span("z", 0, 6))
    swarm = FakeSwarm(whole, spare)
    terms = StreamTerms("tiny", 64, QUICK, whole_from=6)
    async with InferenceSession(swarm, swarm, terms, BLOCKS) as session:
        hidden = random_states(1, 26)
        output = await run_steps(session, hidden, (2, 2, 20, 1, 1))
    assert_same(output, run_blocks(BLOCKS, hidden))
    replayed = [message.hidden.shape[1] for message in spare.messages]
    assert replayed == [4, 20, 1, 1]
