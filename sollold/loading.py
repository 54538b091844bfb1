"""Loads a model: decide → reserve → start → wait until ready. One call, one pool, or one reason why not."""

import asyncio
import contextlib
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import structlog
from sollol.errors import Reason, Refusal, SollolError, refuse
from sollol.report import Decision, Instance, InstanceState, NodeStatus, PlacementWish, Progress

from sollold.agent_link import AgentLink

log = structlog.get_logger(__name__)

MAX_ATTEMPTS = 4

# After these the same start may succeed on another node; after anything else it would fail there too.
ELSEWHERE = frozenset(
    {
        Reason.MEMORY_SHORT,
        Reason.OUT_OF_MEMORY,
        Reason.AGENT_UNREACHABLE,
        Reason.BACKING_OFF,
        Reason.ENGINE_MISSING,
        Reason.ENGINE_START_FAILED,
        Reason.ENGINE_DIED,
        Reason.ENGINE_STALLED,
        Reason.PORT_TAKEN,
        Reason.MODEL_ABSENT,
        Reason.MODEL_NOT_FOUND,
        Reason.MODEL_CORRUPT,
        Reason.RESERVATION_MISSING,
        Reason.SHUTTING_DOWN,
    }
)


@dataclass(frozen=True)
class LoadedPool:
    node_id: str
    instance: Instance


class ClusterView(Protocol):
    def statuses(self) -> tuple[NodeStatus, ...]: ...
    def link(self, node_id: str) -> AgentLink: ...


class Loader:
    """Starts pools.

    Args:
        decide: Placement, given the wish and the nodes still in question.
        record: Told every decision; must not block.
    """

    def __init__(
        self,
        nodes: ClusterView,
        *,
        decide: Callable[[PlacementWish, Sequence[NodeStatus]], Decision],
        record: Callable[[Decision], None],
        reservation_ttl: timedelta,
        load_timeout_s: float,
    ) -> None:
        self._nodes = nodes
        self._decide = decide
        self._record = record
        self._reservation_ttl = reservation_ttl
        self._load_timeout_s = load_timeout_s

    async def load(self, wish: PlacementWish, on_progress: Callable[[Progress], None]) -> LoadedPool:
        """Return a READY pool of the model.

        Raises:
            SollolError: no node fits (NO_FIT with the node-by-node table), or the last node's reason for failing.
        """
        excluded: dict[str, Refusal] = {}
        for _ in range(MAX_ATTEMPTS):
            on_progress(Progress(state="placing"))
            decision = self._placed(wish, excluded)
            try:
                return await self._start(decision, on_progress)
            except SollolError as error:
                refusal = error.refusal
                log.warning(
                    "start_refused",
                    model=wish.model,
                    node=decision.coordinator,
                    reason=refusal.reason,
                    why=refusal.message,
                )
                if refusal.reason not in ELSEWHERE:
                    raise
                excluded[decision.coordinator] = refusal
        raise SollolError(list(excluded.values())[-1])

    def _placed(self, wish: PlacementWish, excluded: dict[str, Refusal]) -> Decision:
        candidates = [status for status in self._nodes.statuses() if status.report.node_id not in excluded]
        if excluded and not candidates:
            raise SollolError(list(excluded.values())[-1])
        decision = self._decide(wish, candidates)
        self._record(decision)
        if decision.refusal is not None:
            # What a node answered when asked is nearer to the truth than that nothing else is left.
            raise SollolError(list(excluded.values())[-1] if excluded else decision.refusal)
        return decision

    async def _start(self, decision: Decision, on_progress: Callable[[Progress], None]) -> LoadedPool:
        plan = decision.plan
        if plan is None:
            raise refuse(
                Reason.MODEL_UNSUPPORTED,
                f"{decision.model}: its header is not readable on {decision.coordinator}, so no plan can be made",
            )
        node_id = decision.coordinator
        link = self._nodes.link(node_id)
        pool_id = new_pool_id(decision.model)
        needs = {share.device_id: share.total_bytes for share in plan.shares}
        await link.reserve(pool_id, needs, self._reservation_ttl)
        try:
            await link.start_coordinator(pool_id, plan)
            async with asyncio.timeout(self._load_timeout_s):
                instance = await self._ready(link, pool_id, node_id, on_progress)
        except TimeoutError as error:
            await self._abandon(link, pool_id)
            raise refuse(
                Reason.LOAD_TIMEOUT,
                f"{decision.model} was not ready on {node_id} within {self._load_timeout_s:.0f} s",
                retryable=True,
            ) from error
        except BaseException:
            await self._abandon(link, pool_id)
            raise
        log.info("pool_ready", model=decision.model, node=node_id, pool=pool_id)
        return LoadedPool(node_id, instance)

    async def _ready(
        self, link: AgentLink, pool_id: str, node_id: str, on_progress: Callable[[Progress], None]
    ) -> Instance:
        async with contextlib.aclosing(link.watch_instance(pool_id)) as changes:
            async for instance in changes:
                if instance.state is InstanceState.READY:
                    return instance
                if instance.refusal is not None:
                    raise SollolError(instance.refusal)
                if instance.state is InstanceState.STOPPED:
                    raise refuse(Reason.STOPPED, f"{pool_id} was stopped while it loaded", retryable=True)
                on_progress(Progress(state="loading", percent=instance.percent, node_id=node_id))
        raise refuse(Reason.AGENT_UNREACHABLE, f"{node_id} went away while {pool_id} loaded", retryable=True)

    async def _abandon(self, link: AgentLink, pool_id: str) -> None:
        """Leave nothing running or reserved; an agent out of reach lets the reservation lapse by itself."""
        try:
            await asyncio.shield(_stop_and_release(link, pool_id))
        except SollolError as error:
            log.warning("pool_not_released", pool=pool_id, error=str(error))


async def _stop_and_release(link: AgentLink, pool_id: str) -> None:
    await link.stop(pool_id)
    await link.release(pool_id)


def new_pool_id(model: str) -> str:
    """A pool id that says which model it is: `llama3.1-70b-5f0c1a2b`. Unique, safe as a file name."""
    stem = re.sub(r"[^A-Za-z0-9.]+", "-", model).strip("-.")[:40] or "model"
    return f"{stem}-{uuid.uuid4().hex[:8]}"
