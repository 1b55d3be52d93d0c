"""The interop checklist (protocol.md 10, server) over stock stubs: names, info, passes, reachability."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import torch
from hivemind.p2p import P2PHandlerError
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.tensor_descr import BatchTensorDescriptor

from petalsd.engine.limits import EngineLimits
from petalsd.swarm.codec import split_for_stream
from petalsd.swarm.node import Node
from tests.engine.rig import states
from tests.numeric import assert_close
from tests.swarm.servers import PREFIX, Server
from tests.swarm.stock import DUMMY, Request, decoded, runtime_pb2, stock_request

pytestmark = [pytest.mark.swarm, pytest.mark.asyncio(loop_scope="module")]
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


async def info(server: Server, client: Node, uid: str = "") -> dict[str, object]:
    reply = await server.stock(client).rpc_info(runtime_pb2.ExpertUID(uid=uid), timeout=10)
    return MSGPackSerializer.loads(reply.serialized_info)


async def test_row_1_every_call_answers_under_its_stock_name_and_kind(tiny: Server, client: Node) -> None:
    """Row 1: stock stubs reach each of the seven calls; the unary ones unary, the streamed ones streamed."""
    stub, hidden = tiny.stock(client), states(1, 3)
    request = stock_request(tiny.uid, [hidden, DUMMY], {"points": 0.0})
    assert await info(tiny, client)
    (forward,) = decoded(await stub.rpc_forward(request, timeout=20))
    (backward,) = decoded(
        await stub.rpc_backward(stock_request(tiny.uid, [hidden, forward, DUMMY], {}), timeout=20)
    )
    streamed = await stub.rpc_forward_stream(_parts(request))
    (same,) = [tensor async for answer in streamed for tensor in decoded(answer)]
    assert torch.equal(same, forward) and backward.shape == hidden.shape
    streamed = await stub.rpc_backward_stream(_parts(stock_request(tiny.uid, [hidden, forward, DUMMY], {})))
    (same,) = [tensor async for answer in streamed for tensor in decoded(answer)]
    assert torch.equal(same, backward)
    await stub.rpc_push(stock_request(tiny.uid, [hidden], {"session_id": "nobody"}), timeout=10)
    session = await tiny.stock_session(client)
    assert (await session.step(tiny.uid, hidden, max_length=4)).shape == hidden.shape
    assert await session.end()


async def test_row_4_free_tokens_are_counted_in_the_single_unit(tiny: Server, client: Node) -> None:
    """Row 4: cache_tokens_available is the free tokens over all blocks, K and V together."""
    assert (await info(tiny, client))["cache_tokens_available"] == tiny.pool.tokens_free == 512 * 4


async def test_row_7_schemas_are_nested_as_stock_clients_unpack_them(tiny: Server, client: Node) -> None:
    """Row 7: no compression, a 1-tuple of outputs, no keyword names, three inference tensors."""
    facts = await info(tiny, client, f"{PREFIX}.2")
    hidden = BatchTensorDescriptor(1, 2048, 64, dtype=torch.float32)
    prompts = BatchTensorDescriptor((), dtype=torch.float32)
    hypo_ids = BatchTensorDescriptor((), dtype=torch.int64)
    assert facts["forward_schema"] == ((hidden,), {})
    assert facts["outputs_schema"] == (hidden,)
    assert facts["keyword_names"] == ()
    assert facts["inference_schema"] == ((hidden, prompts, hypo_ids), {})
    assert hidden.compression == runtime_pb2.NONE
    assert facts["dht_client_mode"] is False and facts["version"] == "0.1.0"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
async def test_row_8_any_float_dtype_is_taken_and_one_is_answered(
    tiny: Server, client: Node, dtype: torch.dtype
) -> None:
    """Row 8: hidden states in any float dtype, four-byte bfloat16 too; the answer is in the server's dtype."""
    hidden = states(2, 3).to(dtype)
    (answer,) = decoded(
        await tiny.stock(client).rpc_forward(stock_request(tiny.uid, [hidden, DUMMY], {}), timeout=20)
    )
    assert answer.dtype == torch.float32 and answer.shape == hidden.shape
    assert_close(answer, tiny.model.expected(hidden.float()).detach(), **TOLERANCE, what=str(dtype))


async def test_row_13_an_answer_too_large_for_one_message_is_refused(tiny: Server, client: Node) -> None:
    """Row 13: p2pd would drop it and the caller wait for its timeout; instead it hears of the streamed call."""
    stub = tiny.stock(client)
    prompts = torch.zeros(4, 1, 300, 64)
    request = stock_request(
        tiny.uid, [torch.zeros(16, 301, 64, dtype=torch.float16)] * 2 + [prompts], {"points": 0}
    )
    with pytest.raises(P2PHandlerError, match=r"bad_request: tensors = .*use the streamed call"):
        await stub.rpc_backward(request, timeout=60)


async def test_row_15_limits_are_no_smaller_than_stock_defaults() -> None:
    """Row 15: a client that fits a stock server with large limits fits ours."""
    assert EngineLimits().max_session_tokens >= 8192


async def test_row_18_prompts_are_added_at_each_block(tiny: Server, client: Node) -> None:
    """Row 18: slice k is added to the first tokens of block k's input, in passes and in sessions alike."""
    hidden, prompts = states(2, 5), 0.3 * states(4 * 2, 3, seed=1).view(4, 2, 3, 64)
    expected = hidden
    for block in tiny.span:
        entering = expected.clone()
        entering[:, :3] += prompts[block]
        expected = _block(tiny, entering, block)
    request = stock_request(tiny.uid, [hidden, prompts], {})
    (answer,) = decoded(await tiny.stock(client).rpc_forward(request, timeout=20))
    assert_close(answer, expected, **TOLERANCE, what="pass")
    session = await tiny.stock_session(client)
    answer = await session.step(tiny.uid, hidden, prompts, max_length=8)
    assert_close(answer, expected, **TOLERANCE, what="session")
    assert await session.end()


@pytest.mark.parametrize("slices", [1, 3, 5])
async def test_row_18_the_number_of_prompts_must_match(tiny: Server, client: Node, slices: int) -> None:
    """Row 18: stock servers silently run only the first blocks; we refuse."""
    request = stock_request(tiny.uid, [states(1, 3), torch.zeros(slices, 1, 2, 64)], {})
    with pytest.raises(P2PHandlerError, match="bad_request: prompts"):
        await tiny.stock(client).rpc_forward(request, timeout=20)


@pytest.mark.parametrize(
    ("uid", "error"),
    [
        (f"{PREFIX}.1 {PREFIX}.0", "bad_request: uid"),
        (f"{PREFIX}.1 {PREFIX}.1", "bad_request: uid"),
        (f"{PREFIX}.0 {PREFIX}.2", "bad_request: uid"),
        (f"{PREFIX}.3 {PREFIX}.4", "not_served"),
        ("other-hf.0", "not_served"),
        ("", "bad_request: uid"),
    ],
)
async def test_row_19_blocks_not_served_or_out_of_order_are_refused(
    tiny: Server, client: Node, uid: str, error: str
) -> None:
    """Row 19: what we do not serve exactly as asked is refused loudly, in unary and streamed calls."""
    request = stock_request(uid, [states(1, 3), DUMMY], {})
    with pytest.raises(P2PHandlerError, match=error):
        await tiny.stock(client).rpc_forward(request, timeout=20)
    with pytest.raises(P2PHandlerError, match=error):
        await anext(await tiny.stock(client).rpc_forward_stream(_parts(request)))


async def test_a_sub_range_runs_only_its_blocks(tiny: Server, client: Node) -> None:
    """A request for blocks 1 and 2 gives what these two give."""
    hidden = states(1, 4)
    request = stock_request(f"{PREFIX}.1 {PREFIX}.2", [hidden, DUMMY], {})
    (answer,) = decoded(await tiny.stock(client).rpc_forward(request, timeout=20))
    assert_close(answer, _block(tiny, _block(tiny, hidden, 1), 2), **TOLERANCE, what="blocks 1:3")


async def test_a_large_pass_is_streamed_both_ways(tiny: Server, client: Node) -> None:
    """Our stub streams above 1 MiB, in parts of 4 MiB at most, and gets the whole answer back."""
    hidden = states(48, 400, seed=3)
    assert hidden.nbytes > 4 * 2**20
    (answer,) = await tiny.stub(client).forward(tiny.uid, [hidden, DUMMY], {}, timeout_s=60)
    assert_close(answer[:2], tiny.model.expected(hidden[:2]).detach(), **TOLERANCE, what="rows 0:2")
    assert answer.shape == hidden.shape


async def test_backward_gives_the_gradients_of_inputs_and_prompts(tiny: Server, client: Node) -> None:
    """Two tensors come back when prompts went in, one else; they are autograd's."""
    hidden = states(2, 4).requires_grad_()
    output = tiny.model.expected(hidden)
    grad_output = states(2, 4, seed=5)
    output.backward(grad_output)
    tensors = [hidden.detach(), grad_output, torch.zeros(4, 1, 2, 64)]
    inputs, prompts = await tiny.stub(client).backward(tiny.uid, tensors, {})
    assert_close(inputs, hidden.grad, **TOLERANCE, what="input gradients")
    assert prompts.shape == (4, 2, 2, 64)
    (alone,) = await tiny.stub(client).backward(tiny.uid, [*tensors[:2], DUMMY], {})
    assert_close(alone, inputs, **TOLERANCE, what="without prompts")


async def test_parts_that_name_different_blocks_are_refused(tiny: Server, client: Node) -> None:
    """All parts of a streamed request repeat one uid."""
    first = stock_request(f"{PREFIX}.0", [states(1, 3)], {})
    second = stock_request(f"{PREFIX}.1", [DUMMY], {})

    async def requests() -> AsyncIterator[Request]:
        yield first
        yield second

    answers = await tiny.stock(client).rpc_forward_stream(requests())
    with pytest.raises(P2PHandlerError, match=r"bad_request: uid = .*same blocks"):
        await asyncio.wait_for(anext(answers), 20)


async def _parts(request: Request) -> AsyncIterator[Request]:
    for tensor in request.tensors:
        for part in split_for_stream(tensor, part_bytes=100):
            yield Request(uid=request.uid, tensors=[part], metadata=request.metadata)


def _block(server: Server, hidden: torch.Tensor, block: int) -> torch.Tensor:
    with torch.no_grad():
        return server.model.blocks[block].forward_dense(hidden)
