"""Names of blocks and calls."""

from __future__ import annotations

import pytest

from petalsd.errors import BadRequest
from petalsd.swarm import protocol
from petalsd.types import BlockSpan


def test_a_uid_is_prefix_dot_number() -> None:
    """A block's uid is read back into prefix and number."""
    assert protocol.make_uid("Llama-hf", 12) == "Llama-hf.12"
    assert protocol.parse_uid("org/Llama-hf.12") == ("org/Llama-hf", 12)


@pytest.mark.parametrize(
    "uid", ["", "x", ".1", "x.", "x.-1", "x.1.2", "x.1e3", "x.٣", "x.99999999999", "x. 1"]
)
def test_a_malformed_uid_is_refused(uid: str) -> None:
    """Anything but one prefix and one plain number is a BadRequest that shows the uid."""
    with pytest.raises(BadRequest) as refusal:
        protocol.parse_uid(uid)
    assert refusal.value.field == "uid"


def test_a_chain_names_all_blocks_of_a_span_in_order() -> None:
    """The uid field of a request is the blocks' uids joined by single spaces."""
    chain = protocol.make_chain("m", BlockSpan(3, 6))
    assert chain == "m.3 m.4 m.5"
    assert protocol.parse_span(chain) == ("m", BlockSpan(3, 6))


@pytest.mark.parametrize("chain", ["m.1 m.3", "m.2 m.1", "m.1 m.1", "m.1 n.2", "m.1  m.2", "m.1 "])
def test_a_chain_that_is_no_span_is_refused(chain: str) -> None:
    """Gaps, repetitions, wrong order, two models or stray blanks are refused loudly (checklist 19)."""
    with pytest.raises(BadRequest):
        protocol.parse_span(chain)


def test_the_wire_names_are_those_that_stock_clients_dial() -> None:
    """Protocol ids are the reference's class and method names (checklist 1)."""
    names = [protocol.handle_name(method) for method in protocol.UNARY_METHODS + protocol.STREAM_METHODS]
    assert sorted(names) == [
        "TransformerConnectionHandler.rpc_backward",
        "TransformerConnectionHandler.rpc_backward_stream",
        "TransformerConnectionHandler.rpc_forward",
        "TransformerConnectionHandler.rpc_forward_stream",
        "TransformerConnectionHandler.rpc_inference",
        "TransformerConnectionHandler.rpc_info",
        "TransformerConnectionHandler.rpc_push",
    ]


def test_announced_throughput_counts_half_of_the_span_and_the_network() -> None:
    """min(forward / ((n+1)/2), network), a relayed network counting a fifth."""
    assert protocol.announced_throughput(1000.0, 1e9, 9, is_relayed=False) == 200.0
    assert protocol.announced_throughput(1000.0, 50.0, 9, is_relayed=False) == 50.0
    assert protocol.announced_throughput(1000.0, 50.0, 9, is_relayed=True) == 10.0


def test_a_chain_is_as_long_as_models_need_and_no_longer() -> None:
    """A thousand blocks with a long name are split; what would take seconds to split is not looked at."""
    span = BlockSpan(0, 1000)
    assert protocol.parse_span(protocol.make_chain("m" * 60, span))[1] == span
    with pytest.raises(BadRequest, match="characters"):
        protocol.parse_span(protocol.make_chain("m", BlockSpan(0, 100_000)))
    with pytest.raises(BadRequest, match="at most 1024 blocks"):
        protocol.parse_span(protocol.make_chain("m", BlockSpan(0, 1025)))
