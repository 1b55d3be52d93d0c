"""A bare hivemind server that answers each step with the step itself: what the wire alone costs."""

from __future__ import annotations

import asyncio

import uvloop
from hivemind.p2p import P2P

from benchmarks.wire import TransformerConnectionHandler


async def serve() -> None:
    p2p = await P2P.create(host_maddrs=["/ip4/127.0.0.1/tcp/0"], auto_nat=False, use_relay=False)
    try:
        await TransformerConnectionHandler().add_p2p_handlers(p2p)
        maddr, *_ = await p2p.get_visible_maddrs()
        print("online", maddr, flush=True)
        await asyncio.Event().wait()
    finally:
        await p2p.shutdown()


if __name__ == "__main__":
    uvloop.run(serve())
