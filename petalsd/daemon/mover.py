"""From one span to another while the blocks that are in both go on serving."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import structlog

from petalsd.daemon.components import Parts
from petalsd.daemon.drain import Drain
from petalsd.daemon.loaded_blocks import HINDRANCES, announce_change, joining, serve_blocks
from petalsd.daemon.parts import SwarmMember
from petalsd.device_faults import raise_if_lost
from petalsd.errors import EngineError, PetalsdError, SwarmError
from petalsd.log import error_fields
from petalsd.swarm.protocol import ServerState
from petalsd.types import BlockSpan

log = structlog.get_logger(__name__)

_T = TypeVar("_T")


class MoveFailed(PetalsdError):
    """``served`` is served now: the span of before, or as many blocks around those that were online by then."""

    code = "move_failed"

    def __init__(self, message: str, served: BlockSpan) -> None:
        super().__init__(message)
        self.served = served


@dataclass(frozen=True, slots=True)
class Route:
    """From ``old`` to ``new``, which the pool has pages for."""

    old: BlockSpan
    new: BlockSpan

    @property
    def kept(self) -> BlockSpan | None:
        """Blocks in both."""
        return self.old.intersect(self.new)

    @property
    def left(self) -> tuple[BlockSpan, ...]:
        return self.old.minus(self.new)

    @property
    def arriving(self) -> tuple[BlockSpan, ...]:
        return self.new.minus(self.old)

    def refuge(self, online: BlockSpan | None) -> BlockSpan:
        """What to serve when the new span cannot be had, but ``online`` is: all of that, and as many as before.

        The old span where nothing new is online, or where no blocks are in both: a failure costs no blocks.
        """
        old = self.old
        if online is None or self.kept is None or old.covers(online):
            return old
        if online.covers(old):
            return online if self.new.covers(old) else old
        end = online.end if online.end > old.end else max(online.end, online.start + len(old))
        return BlockSpan(min(online.start, end - len(old)), end)


@dataclass(frozen=True, slots=True)
class Move:
    """That a span was left for another one; ``at_unix_s`` is when that other one was served."""

    at_unix_s: float
    old: BlockSpan
    new: BlockSpan
    reason: str


class Mover:
    """One move at a time. ``drain``: the wait for sessions on the blocks that it leaves, while there is one."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.drain: Drain | None = None
        self._online: BlockSpan | None = None  # what is announced so while it moves

    @property
    def takes_sessions(self) -> bool:
        """Whether there are blocks that serve during the move."""
        return self._online is not None

    async def move(self, route: Route) -> None:
        """Serve ``route.new``, and say so; sessions on ``route.kept`` notice nothing.

        Those on blocks that are left have the time of a drain. MoveFailed when the new blocks cannot be had.
        EngineError when the engine does not take part: then nothing is as it should be.
        """
        self._online = route.old
        try:
            await self._change(route)
        except (EngineError, *HINDRANCES) as error:
            raise_if_lost(error)
            refuge = route.refuge(self._online)
            old, new = str(route.old), str(route.new)
            log.warning("move_failed", old=old, new=new, served=str(refuge), **error_fields(error))
            self._parts.activity.at(f"going back to blocks {refuge}")
            await self._go_back(refuge)
            raise MoveFailed(f"blocks {route.new} cannot be served: {error}", refuge) from error
        self._parts.loader.drop_outside(route.new)
        await announce_change(self._parts, [(ServerState.ONLINE, route.new)])

    async def _change(self, route: Route) -> None:
        """What may fail for long comes first, while everything is served: the download of the first new block."""
        loader = self._parts.loader
        order = self._parts.rebalancer.loading_order(route.new, route.kept)
        if route.arriving:
            await self._announce_way(route, route.old)  # early, or others would fill the same gap
        self._parts.activity.at(f"all blocks go on serving, fetching {_blocks(route.arriving)}")
        await loader.fetch_first(order)
        is_beside = self._parts.has_room(sum(map(len, route.arriving)))
        log.info("moving", old=str(route.old), new=str(route.new), is_beside=is_beside)
        if is_beside:
            await self._load_beside(route, order)
        if route.left:
            await self._see_off(route)
        if not is_beside:
            await self._let_go(route.kept)
            self._say(f"loading {_blocks(route.arriving)}")
            await loader.load(order, partial(self._show, route))
        self._say(f"testing blocks {route.new}")
        await serve_blocks(self._parts, route.new, len(route.new))
        await self._parts.engine.self_test()

    async def _load_beside(self, route: Route, order: Sequence[int]) -> None:
        """Everything is served on, and new blocks that are next to it as they come.

        When sessions must be waited for, all new ones are served before that.
        """
        self._say(f"loading {_blocks(route.arriving)}")
        if route.kept is None:  # nobody can announce two spans
            await self._parts.loader.load(order)
            return
        await self._parts.loader.load(order, partial(self._show, route))
        if route.arriving and self._parts.engine.work_outside(route.new):
            await self._show(route, route.new)

    async def _show(self, route: Route, part: BlockSpan) -> None:
        """Serve ``part`` of the new span too."""
        online = part if self._online is None else part.hull(self._online)
        await serve_blocks(self._parts, online, len(route.new))
        await self._parts.engine.self_test()
        log.info("part_online", span=str(online), goal=str(route.new))
        await self._announce_way(route, online)
        self._say(f"loading {_blocks(route.new.minus(online))}")

    async def _see_off(self, route: Route) -> None:
        """Let sessions on blocks that are left go on elsewhere or finish, and end those that do not in time.

        No new sessions on those blocks, and the swarm knows it. That they are OFFLINE is said for as long as the
        move lasts: takers of their sessions look us up there.
        """
        parts = self._parts
        staying = None if self._online is None else self._online.intersect(route.new)
        parts.engine.restrict(staying, f"this server moves to blocks {route.new}")
        await self._announce_way(route, staying)
        self._say(f"sessions on {_blocks(route.left)} finish")
        deadline_s = parts.settings.config.daemon.drain_deadline_s
        self.drain = Drain(parts.engine, parts.member, deadline_s, staying)
        if abandoned := await self.drain.wait(asyncio.Event()):
            log.warning("move_abandoned", sessions_and_passes=abandoned)
            parts.metrics.counter("drain_abandoned_total").inc(abandoned)
            parts.engine.end_work(f"the server moved to blocks {route.new}", keeping=staying)
        self.drain = None

    async def _announce_way(self, route: Route, served: BlockSpan | None) -> None:
        self._online = served
        if served is None:
            told = [(ServerState.OFFLINE, route.old)]
            told += [(ServerState.JOINING, span) for span in route.arriving]
        else:
            told = [(ServerState.OFFLINE, span) for span in route.old.minus(served)]
            told += joining(route.new, served)
        await announce_change(self._parts, told, route.new)

    def _say(self, what: str) -> None:
        self._parts.activity.at(
            what if self._online is None else f"blocks {self._online} go on serving, {what}"
        )

    async def _let_go(self, kept: BlockSpan | None) -> None:
        """Free the memory of all but ``kept``."""
        self._parts.loader.drop_outside(kept)
        if kept is None:
            await self._parts.engine.drop_span("this server moves to other blocks")
        else:
            await serve_blocks(self._parts, kept, len(kept))

    async def _go_back(self, span: BlockSpan) -> None:
        """Serve the old span as before, or what is left of the move; what was given up is still on the disk."""
        engine, loader = self._parts.engine, self._parts.loader
        loader.drop_outside(span)
        if engine.span != span:
            if engine.span is not None and engine.span.intersect(span) is None:
                await engine.drop_span(f"this server goes back to blocks {span}")
            await loader.load(span)
            await serve_blocks(self._parts, span, len(span))
        engine.lift_restriction()
        self._parts.board.clear("load_failed")
        await announce_change(self._parts, [(ServerState.ONLINE, span)])


def _blocks(spans: Sequence[BlockSpan]) -> str:
    return f"blocks {', '.join(map(str, spans))}" if spans else "no blocks"


async def while_member_lives(member: SwarmMember, work: Coroutine[Any, Any, _T]) -> _T:
    """``await work``; SwarmError at once when the member breaks meanwhile."""
    working = asyncio.create_task(work, name="work")
    failure = asyncio.create_task(member.until_failed(), name="member-failure")
    try:
        await asyncio.wait({working, failure}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise SwarmError(failure.result())
        return working.result()
    finally:
        for task in (working, failure):
            task.cancel()
        await asyncio.gather(working, failure, return_exceptions=True)
