"""Ends what is left of pools that have lost a part: at once, on every node, so that the next plan has the memory."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

import structlog
from sollol.errors import SUSPECTED_BACKENDS, Refusal, SollolError
from sollol.report import NodeStatus

from sollold import group
from sollold.away import is_away

log = structlog.get_logger(__name__)

# After all nodes were out of reach they come back one by one: until then, absence says nothing.
BACK_WITHIN_S = 5.0
SETTLED_WITHIN_S = 8.0
LOOK_AGAIN_S = 0.5
LOST_REMEMBERED = 4096
EXPLAINED_WITHIN_S = 0.7


class Agent(Protocol):
    async def stop(self, instance_id: str, *, at_once: bool = False) -> None: ...


class ClusterView(Protocol):
    def statuses(self) -> tuple[NodeStatus, ...]: ...
    def status(self, node_id: str) -> NodeStatus | None: ...
    def link(self, node_id: str) -> Agent: ...


class Reaper:
    """Owner of the list of lost pools. What was lost once stays so: its parts end wherever they turn up again.

    Args:
        on_lost: Told of every lost pool, and why, before anything of it is stopped.
    """

    def __init__(
        self,
        nodes: ClusterView,
        *,
        on_lost: Callable[[str, Refusal], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._nodes, self._on_lost, self._clock = nodes, on_lost, clock
        self._lost: dict[str, Refusal] = {}
        self._stops: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._seen: dict[str, object] = {}
        self._changed, self._settled = asyncio.Event(), asyncio.Event()
        self._told = asyncio.Event()  # set, and replaced, with every loss
        self._blind_until_s = 0.0

    async def explained(self, pool_id: str, refusal: Refusal) -> Refusal:
        """What a part of the pool says of its end, or what is known better here.

        Where it could not tell which backend was lost, the node of that backend gets a moment to say so.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(EXPLAINED_WITHIN_S):
                while SUSPECTED_BACKENDS in self._lost.get(pool_id, refusal).numbers:
                    await self._told.wait()
        return self._lost.get(pool_id, refusal)

    def on_node_changed(self, node_id: str) -> None:
        """It reported, was lost or forgotten. Nearly all reports say nothing new here, and cost nothing more."""
        seen = _what_matters(self._nodes.status(node_id))
        if seen != self._seen.get(node_id):
            self._seen[node_id] = seen
            self._changed.set()
        if seen is None:
            self._seen.pop(node_id, None)

    async def run(self) -> None:
        """Look at the cluster whenever something changed, until cancelled."""
        try:
            while True:
                self._changed.clear()
                open_questions = self._look()
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_AGAIN_S if open_questions else None):
                        await self._changed.wait()
        finally:
            stops = tuple(self._stops.values())
            for task in stops:
                task.cancel()
            await asyncio.gather(*stops, return_exceptions=True)

    async def settled(self) -> None:
        """Return when nothing is left of lost pools on the nodes that can be asked, or this takes too long."""
        self._look()
        try:
            async with asyncio.timeout(SETTLED_WITHIN_S):
                await self._settled.wait()
        except TimeoutError:
            log.warning("remains_not_ended", parts=group.remains(self._nodes.statuses(), self._lost))

    def _look(self) -> bool:
        """Act on what the nodes say now; returns whether time alone may change that."""
        statuses = self._nodes.statuses()
        lost_nodes, undecided = self._lost_nodes(statuses)
        for pool_id, why in group.losses(statuses, lost_nodes).items():
            known = self._lost.get(pool_id)
            if known is None or (SUSPECTED_BACKENDS in known.numbers and SUSPECTED_BACKENDS not in why.numbers):
                self._lose(pool_id, why)
        left = group.remains(statuses, self._lost)
        for part in left:
            self._stop(*part)
        if left:
            self._settled.clear()
        else:
            self._settled.set()
        return undecided or bool(left)

    def _lost_nodes(self, statuses: Sequence[NodeStatus]) -> tuple[frozenset[str], bool]:
        now = self._clock()
        absent = [status for status in statuses if not status.connected]
        if len(absent) == len(statuses):  # it is us
            self._blind_until_s = now + BACK_WITHIN_S
        if now < self._blind_until_s:
            return frozenset(), bool(absent)
        lost = frozenset(status.report.node_id for status in absent if not is_away(status))
        return lost, len(lost) < len(absent)

    def _lose(self, pool_id: str, why: Refusal) -> None:
        log.warning("pool_lost", pool=pool_id, reason=why.reason, why=why.message)
        self._lost[pool_id] = why
        if len(self._lost) > LOST_REMEMBERED:
            del self._lost[next(iter(self._lost))]
        self._on_lost(pool_id, why)
        told, self._told = self._told, asyncio.Event()
        told.set()

    def _stop(self, node_id: str, pool_id: str) -> None:
        part = (node_id, pool_id)
        if part not in self._stops:
            task = asyncio.create_task(self._stop_part(node_id, pool_id), name=f"reap {pool_id} on {node_id}")
            self._stops[part] = task
            task.add_done_callback(lambda _: self._stops.pop(part, None))

    async def _stop_part(self, node_id: str, pool_id: str) -> None:
        try:
            await self._nodes.link(node_id).stop(pool_id, at_once=True)
        except SollolError as error:  # looked at again as long as the node lists it
            log.warning("remains_not_stopped", node=node_id, pool=pool_id, why=str(error))
        else:
            log.info("remains_stopped", node=node_id, pool=pool_id)


def _what_matters(status: NodeStatus | None) -> object:
    if status is None:
        return None
    report = status.report
    parts = tuple((each.instance_id, each.state) for each in report.instances)
    return status.connected, parts, tuple(each.pool_id for each in report.reservations)
