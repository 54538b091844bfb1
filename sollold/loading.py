"""Loads a model: decide → have it started → elsewhere when that fails. One call, one pool, or one reason why not."""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import structlog
from msgspec.structs import replace
from sollol.errors import Reason, Refusal, Retry, SollolError, refuse
from sollol.inference import Progress
from sollol.report import Decision, NodeStatus, PlacementWish, Pool

from sollold import group
from sollold.away import GONE, first_back, is_away
from sollold.starting import new_pool_id

log = structlog.get_logger(__name__)

MAX_ATTEMPTS = 4

# After these the same start may succeed on another node; after anything else it would fail there too.
ELSEWHERE = frozenset(
    {
        Reason.STALE_REPORT,
        Reason.CORDONED,
        Reason.MEMORY_SHORT,
        Reason.OUT_OF_MEMORY,
        Reason.AGENT_UNREACHABLE,
        Reason.AGENT_RESTARTING,
        Reason.BACKING_OFF,
        Reason.ENGINE_MISSING,
        Reason.ENGINE_START_FAILED,
        Reason.ENGINE_DIED,
        Reason.ENGINE_STALLED,
        Reason.PORT_TAKEN,
        Reason.CERTIFICATE_UNREADABLE,
        Reason.TRANSPORT_MISMATCH,
        Reason.MODEL_ABSENT,
        Reason.MODEL_NOT_FOUND,
        Reason.MODEL_CORRUPT,
        Reason.MODEL_UNSUPPORTED,  # engines are not all of one build
        Reason.RESERVATION_MISSING,
        Reason.INSTANCE_NOT_FOUND,
        Reason.SHUTTING_DOWN,
        Reason.INTERNAL,
    }
)
# After these the same node may do it in a moment.
AWAY = GONE | {Reason.SHUTTING_DOWN}


class LostPools(Protocol):
    """What `Reaper` is to this module."""

    async def settled(self) -> None: ...


class Starts(Protocol):
    """What `Starter` is to this module."""

    async def start(self, pool_id: str, decision: Decision, on_progress: Callable[[Progress], None]) -> Pool: ...


class ClusterView(Protocol):
    def statuses(self) -> tuple[NodeStatus, ...]: ...
    def status(self, node_id: str) -> NodeStatus | None: ...


class Loader:
    """Loads models: places, has the pool started, and places again without a node that could not.

    Args:
        decide: Placement, given the wish and the nodes still in question.
        record: Told every decision; must not block.
        lost: Knows what lost pools leave behind; nothing is placed before their memory is free again.
        load_timeout_s: From the first placement to ready, attempts on several nodes together.
    """

    def __init__(
        self,
        nodes: ClusterView,
        starter: Starts,
        *,
        decide: Callable[[PlacementWish, Sequence[NodeStatus]], Decision],
        record: Callable[[Decision], None],
        lost: LostPools,
        load_timeout_s: float,
    ) -> None:
        self._nodes = nodes
        self._starter = starter
        self._decide = decide
        self._record = record
        self._lost = lost
        self._load_timeout_s = load_timeout_s

    async def load(self, wish: PlacementWish, number: int, on_progress: Callable[[Progress], None]) -> Pool:
        """Return a READY pool of the model. When this fails or is cancelled, what it had started is stopped.

        Raises:
            SollolError: no node fits (NO_FIT with the node-by-node table), LOAD_TIMEOUT, or the last node's reason for
                failing.
            GaveWayError: another head starts, or has started, the very pool that this one would have been.
        """
        try:
            async with asyncio.timeout(self._load_timeout_s):
                return await self._load_somewhere(wish, number, on_progress)
        except TimeoutError as error:
            raise refuse(
                Reason.LOAD_TIMEOUT, f"{wish.model} was not ready within {self._load_timeout_s:.0f} s", retryable=True
            ) from error

    def limit(self, load_timeout_s: float) -> None:
        """For loads that begin from now on."""
        self._load_timeout_s = load_timeout_s

    async def _load_somewhere(self, wish: PlacementWish, number: int, on_progress: Callable[[Progress], None]) -> Pool:
        failed: dict[str, Refusal] = {}
        await self._lost.settled()
        for _ in range(MAX_ATTEMPTS):
            on_progress(Progress(state="placing"))
            decision = await self._placed(wish, number, failed)
            try:
                return await self._starter.start(new_pool_id(wish.model), decision, on_progress)
            except SollolError as error:
                refusal = error.refusal
                node_id = error.node_id if isinstance(error, group.NodeRefusedError) else decision.coordinator
                log.warning(
                    "start_refused",
                    model=wish.model,
                    node=node_id,
                    reason=refusal.reason,
                    why=refusal.message,
                )
                failed.pop(node_id, None)  # it may have been back for this attempt: the newest is the last
                failed[node_id] = refusal
                if refusal.reason not in ELSEWHERE:
                    raise SollolError(_told(failed, node_id)) from error
        raise SollolError(_last_word(failed))

    async def _placed(self, wish: PlacementWish, number: int, failed: dict[str, Refusal]) -> Decision:
        """A plan without those that failed; when there is none, one with a node that was away and is back.

        Raises:
            SollolError: there is none, and nobody to wait for.
        """
        while (decision := self._decided(wish, number, failed)).refusal is not None:
            away = {node_id for node_id, refusal in failed.items() if refusal.reason in AWAY}
            away.update(each.report.node_id for each in self._nodes.statuses() if is_away(each))
            back = await first_back(away, self._nodes.status) if self._would_do(wish, away, failed) else None
            if back is None:
                raise SollolError(_last_word(failed, decision.refusal))
            failed.pop(back, None)
        return decision

    def _would_do(self, wish: PlacementWish, away: Collection[str], failed: Collection[str]) -> bool:
        """Whether there would be a plan if these nodes were back."""
        hoped = [
            replace(each, connected=True, report_age_s=0.0) if each.report.node_id in away else each
            for each in self._nodes.statuses()
            if each.report.node_id in away or each.report.node_id not in failed
        ]
        return bool(away) and self._decide(wish, hoped).refusal is None

    def _decided(self, wish: PlacementWish, number: int, failed: Collection[str]) -> Decision:
        candidates = [status for status in self._nodes.statuses() if status.report.node_id not in failed]
        decision = self._decide(wish, candidates)
        if decision.plan is not None:
            # The name that was asked for, which on this node may be an alias: queues find the pool under it.
            decision = replace(decision, plan=replace(decision.plan, model=wish.model, pool_number=number))
        self._record(decision)
        return decision


def _last_word(failed: Mapping[str, Refusal], nothing_left: Refusal | None = None) -> Refusal:
    """Why it failed on the last node that may do it later, else on the last node.

    What a node answered when asked is nearer to the truth than that nothing else is left, unless only that may change.
    """
    later = [node_id for node_id, refusal in failed.items() if refusal.retry is Retry.RETRYABLE]
    if nothing_left is not None and not later:
        may_change = nothing_left.reason is Reason.NO_FIT and nothing_left.retry is Retry.RETRYABLE
        if may_change or not failed:
            return _after(failed, nothing_left)
    return _told(failed, (later or list(failed))[-1])


def _told(failed: Mapping[str, Refusal], node_id: str) -> Refusal:
    """Why that node failed, with a word on the others."""
    if len(failed) == 1:
        return failed[node_id]
    others = {other: refusal for other, refusal in failed.items() if other != node_id}
    return _after(others, replace(failed[node_id], message=f"{node_id}: {failed[node_id].message}"))


def _after(failed: Mapping[str, Refusal], refusal: Refusal) -> Refusal:
    tried = "; ".join(f"{node}: {each.reason}" for node, each in failed.items())
    return replace(refusal, message=f"{refusal.message} (tried before: {tried})") if tried else refusal
