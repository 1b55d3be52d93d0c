"""From one span to another while the blocks that are in both go on serving."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import structlog

from petalsd.daemon.components import Parts
from petalsd.daemon.drain import Drain
from petalsd.device_faults import raise_if_lost
from petalsd.errors import DeadlineExceeded, EngineError, ModelError, PetalsdError, SwarmError
from petalsd.log import error_fields
from petalsd.models.contract import Block
from petalsd.swarm.announcer import Part
from petalsd.swarm.protocol import ServerState
from petalsd.types import BlockSpan

log = structlog.get_logger(__name__)

# What keeps blocks from being loaded and computed on; RuntimeError is how torch runs out of memory.
_HINDRANCES = (ModelError, EngineError, OSError, MemoryError, RuntimeError)


class MoveFailed(PetalsdError):
    """The span of before is served again, whole."""

    code = "move_failed"


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
        self.takes_sessions = False  # on blocks that stay, or on all while nothing is given up yet

    async def move(self, route: Route) -> None:
        """Serve ``route.new``, and say so; sessions on ``route.kept`` notice nothing.

        Those on blocks that are left have the time of a drain. MoveFailed when the new blocks cannot be had.
        EngineError or DeadlineExceeded when the engine does not take part: then nothing is as it should be.
        """
        self.takes_sessions = True
        try:
            await self._change(route)
        except _HINDRANCES as error:
            raise_if_lost(error)
            log.warning("move_failed", old=str(route.old), new=str(route.new), **error_fields(error))
            self._parts.activity.at(f"going back to blocks {route.old}")
            await self._go_back(route)
            raise MoveFailed(f"blocks {route.new} cannot be served: {error}") from error
        self._parts.loader.drop_outside(route.new)
        await self._announce([(ServerState.ONLINE, route.new)])

    async def _announce(self, parts: Sequence[Part], goal: BlockSpan | None = None) -> None:
        """A directory that does not take it is no reason to end anything: it is told again with each renewal."""
        try:
            await self._parts.member.announce_parts(parts, goal)
        except (SwarmError, DeadlineExceeded) as error:
            log.warning("move_not_announced", **error_fields(error))

    async def _change(self, route: Route) -> None:
        """What may fail for long comes first, while everything is served: the download."""
        engine, loader = self._parts.engine, self._parts.loader
        if route.arriving:
            await self._announce_way(route, route.old)  # early, or others would fill the same gap
        self._parts.activity.at(f"all blocks go on serving, fetching {_blocks(route.arriving)}")
        await loader.fetch(route.new)
        await self._narrow(route)
        is_beside = self._parts.has_room(sum(map(len, route.arriving)))
        log.info("moving", old=str(route.old), new=str(route.new), is_beside=is_beside)
        self._at(route, f"loading {_blocks(route.arriving)}")
        if is_beside:
            await loader.load(route.new)
        await self._see_off(route)
        if not is_beside:
            await self._let_go(route.kept)
            await loader.load(route.new)
        self._at(route, f"testing blocks {route.new}")
        await self._serve(route.new)
        await engine.self_test()

    async def _narrow(self, route: Route) -> None:
        """No new sessions on blocks that are left, and the swarm knows it.

        That they are OFFLINE is said for as long as the move lasts: takers of their sessions look us up there.
        """
        self._parts.engine.restrict(route.kept, f"this server moves to blocks {route.new}")
        self.takes_sessions = route.kept is not None
        await self._announce_way(route, route.kept)

    async def _announce_way(self, route: Route, served: BlockSpan | None) -> None:
        online = [] if served is None else [served]
        parts = [(ServerState.OFFLINE, span) for span in route.old.minus(*online)]
        parts += [(ServerState.JOINING, span) for span in route.arriving]
        await self._announce([*parts, *((ServerState.ONLINE, span) for span in online)], route.new)

    async def _see_off(self, route: Route) -> None:
        """Let sessions on blocks that are left go on elsewhere or finish, and end those that do not in time."""
        parts = self._parts
        self._at(route, f"sessions on {_blocks(route.left)} finish")
        deadline_s = parts.settings.config.daemon.drain_deadline_s
        self.drain = Drain(parts.engine, parts.member, deadline_s, route.kept)
        if abandoned := await self.drain.wait(asyncio.Event()):
            log.warning("move_abandoned", sessions_and_passes=abandoned)
            parts.metrics.counter("drain_abandoned_total").inc(abandoned)
            parts.engine.end_work(f"the server moved to blocks {route.new}", keeping=route.kept)
        self.drain = None

    def _at(self, route: Route, what: str) -> None:
        self._parts.activity.at(what if route.kept is None else f"blocks {route.kept} go on serving, {what}")

    async def _let_go(self, kept: BlockSpan | None) -> None:
        """Free the memory of all but ``kept``."""
        engine, loader = self._parts.engine, self._parts.loader
        loader.drop_outside(kept)
        if kept is None:
            await engine.drop_span("this server moves to other blocks")
        else:
            await self._exchange(dict(loader.blocks))

    async def _serve(self, span: BlockSpan) -> None:
        """Put loaded blocks in the place of those that are served."""
        blocks = {index: self._parts.loader.blocks[index] for index in span}
        if self._parts.engine.span is None:
            await self._parts.install(span, blocks)
        else:
            await self._exchange(blocks)

    async def _exchange(self, blocks: Mapping[int, Block]) -> None:
        try:
            await self._parts.exchange(blocks)
        except DeadlineExceeded as error:  # the engine's, where others are the swarm's
            raise EngineError(error.message) from error

    async def _go_back(self, route: Route) -> None:
        """Serve the old span as before; what was given up of it is still on the disk."""
        if self._parts.engine.span != route.old:
            await self._parts.loader.load(route.old)
            await self._serve(route.old)
        self._parts.engine.lift_restriction()
        self._parts.loader.drop_outside(route.old)
        self._parts.board.clear("load_failed")
        await self._announce([(ServerState.ONLINE, route.old)])


def _blocks(spans: Sequence[BlockSpan]) -> str:
    return f"blocks {', '.join(map(str, spans))}" if spans else "no blocks"


async def while_member_lives(parts: Parts, mover: Mover, route: Route) -> None:
    """``mover.move(route)``; SwarmError at once when the member breaks meanwhile."""
    moving = asyncio.create_task(mover.move(route), name="move")
    failure = asyncio.create_task(parts.member.until_failed(), name="member-failure")
    try:
        await asyncio.wait({moving, failure}, return_when=asyncio.FIRST_COMPLETED)
        if not moving.done():
            raise SwarmError(failure.result())
        moving.result()
    finally:
        for task in (moving, failure):
            task.cancel()
        await asyncio.gather(moving, failure, return_exceptions=True)
