"""What an administrator can ask of the daemon: the one way in for the control socket."""

from __future__ import annotations

from petalsd.control.api import Operation
from petalsd.daemon.components import Parts
from petalsd.daemon.daemon import Daemon
from petalsd.daemon.drain import open_work
from petalsd.daemon.plan import Demand
from petalsd.daemon.preview import explain
from petalsd.daemon.refusals import cannot_move
from petalsd.daemon.reloading import Reloader
from petalsd.daemon.reporting import Reporter
from petalsd.errors import BadRequest, Conflict, NotServed
from petalsd.status import (
    Cost,
    ErrorText,
    Gain,
    Peers,
    Plan,
    Progress,
    Reloaded,
    Sessions,
    Span,
    Status,
    Turn,
)
from petalsd.swarm.placement.decision import Decision, Estimate, OwnSpan
from petalsd.types import BlockSpan, DaemonState

_ENDED = (DaemonState.STOPPING, DaemonState.STOPPED, DaemonState.FAILED)


class Administration:
    """``control.api.DaemonApi`` over the real daemon."""

    def __init__(
        self, daemon: Daemon, parts: Parts, num_blocks: int, reporter: Reporter, reloader: Reloader
    ) -> None:
        self._daemon = daemon
        self._parts = parts
        self._num_blocks = num_blocks
        self._reporter = reporter
        self._reloader = reloader

    @property
    def is_ready(self) -> bool:
        return self._daemon.takes_sessions

    @property
    def problem(self) -> str | None:
        stuck = [one.title for one in self._parts.board.active() if one.code == "engine_stuck"]
        return stuck[0] if stuck else None

    def status(self) -> Status:
        return self._reporter.status()

    def sessions(self) -> Sessions:
        return self._reporter.sessions()

    async def peers(self) -> Peers:
        return await self._reporter.peers()

    async def drain(self, deadline_s: float | None) -> None:
        await self._daemon.hold(deadline_s)

    async def resume(self) -> None:
        await self._daemon.release()

    async def reload(self) -> Reloaded:
        outcome = await self._reloader.reload()
        return Reloaded(applied=list(outcome.applied), needs_restart=list(outcome.pending))

    async def plan(self, to: BlockSpan | None) -> Plan:
        """Conflict unless blocks are served, BadRequest for a target that cannot be served."""
        current, demand = self._served_span(), self._parts.demand()
        if to is not None:
            self._check_target(to, demand)
        elif demand.pinned is not None:
            return self._staying(current, _why_pinned(demand, self._num_blocks))
        decision = await self._decide(current, to, demand)
        if to == current:
            return self._staying(current, "these blocks are served already", decision)
        why = explain(decision, demand)
        if not decision.is_move:
            is_off = self._parts.settings.config.blocks.balance_quality == 0
            why = "blocks.balance_quality = 0: it never moves by itself" if is_off else why
            return self._staying(current, why, decision)
        if to is not None:
            pays = decision.estimate.gain_tokens > decision.estimate.cost_tokens
            why = f"these blocks were asked for; {why if pays else 'by itself it would not go there'}"
        return self._plan(decision, would_move=True, explanation=why)

    async def rebalance(self, to: BlockSpan | None) -> Plan:
        plan = await self.plan(to)
        if plan.would_move and plan.proposed is not None:
            target = BlockSpan(plan.proposed.start, plan.proposed.end)
            await self._daemon.move_to(target, f"an administrator asked for it: {plan.explanation}")
        return plan

    def progress(self, operation: Operation) -> Progress:
        state, loading = self._daemon.lifecycle.state, self._reporter.loading()
        deadline_left_s, abandoned = self._reporter.drained()
        drain = self._daemon.drain
        error = self._failure(operation, state)
        return Progress(
            operation=operation,
            state=state.value,
            sessions_left=open_work(self._parts.engine) if drain is None else drain.left,
            deadline_left_s=deadline_left_s,
            abandoned=abandoned,
            stage=None if loading is None else loading.stage,
            item=None if loading is None else loading.item,
            percent=None if loading is None else loading.percent,
            done=error is not None or self._is_done(operation, state),
            outcome=self._outcome(operation) if error is None and self._is_done(operation, state) else None,
            error=error,
        )

    def _served_span(self) -> BlockSpan:
        span, state = self._daemon.span, self._daemon.lifecycle.state
        if span is None or state is not DaemonState.ONLINE:
            raise cannot_move(state, self._parts.instance)
        return span

    def _check_target(self, to: BlockSpan, demand: Demand) -> None:
        if demand.pinned is not None:
            raise Conflict(
                f"to = {to}: {_why_pinned(demand, self._num_blocks)}",
                hint=f"change blocks in the configuration, then: petalsctl -i {self._parts.instance} reload",
            )
        if not BlockSpan(0, self._num_blocks).covers(to):
            raise BadRequest("to", str(to), f"the model has the blocks 0:{self._num_blocks}")
        if not demand.allows(to):
            raise BadRequest("to", str(to), f"the configuration asks for {demand}")

    async def _decide(self, current: BlockSpan, to: BlockSpan | None, demand: Demand) -> Decision:
        """What the rule says, or what going to ``to`` would do. NotServed while the swarm does not show us."""
        rebalancer, own = self._parts.rebalancer, OwnSpan(self._parts.member.peer_id, current)
        view = await self._parts.member.read_live_view()
        if not any(own.peer in records for records in view.blocks):
            raise NotServed(
                "our own record is not in the swarm's directory just now", hint="try again in a few seconds"
            )
        if to is not None:
            return rebalancer.judge(view, own, to)
        return rebalancer.decide(view, own, self._parts.settings.config.blocks.balance_quality, demand)

    def _staying(self, current: BlockSpan, why: str, decision: Decision | None = None) -> Plan:
        if decision is None:
            return Plan(
                current=Span.of(current),
                proposed=None,
                gain=None,
                cost=None,
                weakest=[],
                ahead=[],
                sessions_touched=0,
                sessions_kept=self._parts.engine.stats().sessions,
                would_move=False,
                explanation=why,
            )
        return self._plan(decision, would_move=False, explanation=why)

    def _plan(self, decision: Decision, *, would_move: bool, explanation: str) -> Plan:
        is_other = decision.target != decision.span
        kept = decision.span.intersect(decision.target)
        sessions = [info.spec.span for info in self._parts.engine.open_sessions()]
        touched = sum(kept is None or not kept.covers(span) for span in sessions)
        return Plan(
            current=Span.of(decision.span),
            proposed=Span.of(decision.target) if is_other else None,
            gain=_gain(decision.estimate) if is_other else None,
            cost=_cost(decision) if is_other else None,
            weakest=[Span.of(span) for span in decision.weakest],
            ahead=[
                Turn(peer_id=turn.peer, current=Span.of(turn.span), target=Span.of(turn.target))
                for turn in decision.ahead
            ],
            sessions_touched=touched,
            sessions_kept=len(sessions) - touched,
            would_move=would_move,
            explanation=explanation,
        )

    def _failure(self, operation: Operation, state: DaemonState) -> ErrorText | None:
        """Why it will not come to its end any more."""
        reason = self._daemon.lifecycle.reason
        if operation == "drain":
            is_over = state in (DaemonState.DRAINING, DaemonState.DRAINED, *_ENDED)
            text = "" if is_over else "the drain was called off: the daemon serves again"
        elif state in _ENDED:
            text = f"the daemon is {state.value}: {reason or 'it was told to'}"
        elif operation == "rebalance" and state in (DaemonState.DRAINING, DaemonState.DRAINED):
            text = "a drain came in between"
        elif operation == "rebalance" and self._is_done(operation, state):
            text = self._daemon.move_problem
        else:
            text = ""
        hint = f"petalsctl -i {self._parts.instance} status"
        return ErrorText(code=Conflict.code, message=text, hint=hint) if text else None

    def _outcome(self, operation: Operation) -> str:
        _, abandoned = self._reporter.drained()
        if operation == "rebalance":
            return f"blocks {self._daemon.span} are served"
        if operation == "resume":
            return "serving again"
        return f"{abandoned} left at the deadline were ended" if abandoned else "no sessions are left"

    def _is_done(self, operation: Operation, state: DaemonState) -> bool:
        if operation == "drain":
            return state in (DaemonState.DRAINED, *_ENDED)
        return state is DaemonState.ONLINE


def _gain(figures: Estimate) -> Gain:
    before, after = figures.weakest_before, figures.weakest_after
    return Gain(
        swarm_throughput_before=before,
        swarm_throughput_after=after,
        ratio=after / before if before > 0 else None,
        tokens=figures.gain_tokens,
    )


def _cost(decision: Decision) -> Cost:
    kept = decision.span.intersect(decision.target)
    num_kept = 0 if kept is None else len(kept)
    return Cost(
        blocks_to_load=len(decision.target) - num_kept,
        blocks_kept=num_kept,
        seconds_estimate=decision.estimate.load_s,
        tokens=decision.estimate.cost_tokens,
    )


def _why_pinned(demand: Demand, num_blocks: int) -> str:
    if demand.pinned == BlockSpan(0, num_blocks):
        return "all blocks of the model are served here"
    return f"the configuration pins the blocks {demand.pinned}"
