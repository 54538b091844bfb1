"""Has the links between nodes measured, one after the other, so that placement knows what a hop costs."""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

import structlog
from sollol.errors import SollolError
from sollol.link import Link
from sollol.report import NodeStatus

from sollold.survey import Due, Pair, due

log = structlog.get_logger(__name__)

PAUSE_S = 1.0  # half a second of traffic each: most of the time there is none
LOOK_AGAIN_S = 2.0
NOT_AGAIN_FOR_S = 60.0  # after a refusal; and an agent that finds nobody tries again by itself


class Agent(Protocol):
    async def measure_link(self, node_id: str, host: str, port: int) -> Link: ...


class ClusterView(Protocol):
    def statuses(self) -> tuple[NodeStatus, ...]: ...
    def link(self, node_id: str) -> Agent: ...


class Surveyor:
    """Asks one agent at a time. The results come back with the agents' reports, to every head."""

    def __init__(self, nodes: ClusterView, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._nodes, self._clock = nodes, clock
        self._failed: dict[Pair, float] = {}  # until when each is left alone
        self._refused: set[Pair] = set()  # told once

    async def run(self) -> None:
        """Measure whatever is due, until cancelled."""
        while True:
            found = due(self._nodes.statuses(), besides=self._resting())
            if found is not None:
                await self._measure(found)
            await asyncio.sleep(LOOK_AGAIN_S if found is None else PAUSE_S)

    def _resting(self) -> frozenset[Pair]:
        now_s = self._clock()
        self._failed = {pair: until_s for pair, until_s in self._failed.items() if until_s > now_s}
        return frozenset(self._failed)

    async def _measure(self, wanted: Due) -> None:
        try:
            link = await self._nodes.link(wanted.node_id).measure_link(wanted.peer_id, wanted.host, wanted.port)
        except SollolError as error:
            self._failed[wanted.pair] = self._clock() + NOT_AGAIN_FOR_S
            if wanted.pair not in self._refused:
                log.warning("link_not_measured", node=wanted.node_id, peer=wanted.peer_id, why=str(error))
            self._refused.add(wanted.pair)
            return
        self._refused.discard(wanted.pair)
        if link.unreachable:
            self._failed[wanted.pair] = self._clock() + NOT_AGAIN_FOR_S
        log.debug("link_measured", node=wanted.node_id, link=link)
