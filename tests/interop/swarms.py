"""Private swarms of two servers, each stock or ours, that hold a model together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal

from petalsd.types import BlockSpan
from tests.interop.daemon import DaemonOptions, ForkedDaemon, petalsd_daemon
from tests.interop.models import Model
from tests.interop.stock import ServerOptions, stock_server

Kind = Literal["petalsd", "stock"]


@contextmanager
def two_servers(model: Model, directory: Path, first: Kind, second: Kind) -> Iterator[list[str]]:
    """``first`` serves the lower blocks, ``second`` the upper ones; yields both servers' multiaddresses.

    Their spans overlap where the model is deep enough, so that a route enters the second in its middle.
    """
    middle = model.num_blocks // 2
    overlap = 1 if middle > 1 else 0
    lower, upper = BlockSpan(0, middle + overlap), BlockSpan(middle - overlap, model.num_blocks)
    with (
        _server(first, model, directory / "first", lower, []) as peers,
        _server(second, model, directory / "second", upper, peers) as more,
    ):
        yield peers + more


def _server(
    kind: Kind, model: Model, directory: Path, span: BlockSpan, initial_peers: list[str]
) -> AbstractContextManager[list[str]]:
    if kind == "petalsd":
        return petalsd_daemon(
            DaemonOptions(model.directory, directory, model.dht_prefix, span, initial_peers), ForkedDaemon
        )
    return stock_server(
        ServerOptions(model.petals_directory, directory, model.dht_prefix, span, initial_peers)
    )
