"""Empties nodes that are drained: stops each of their pools once its last stream has ended.

No state of its own: which nodes are drained stands in their reports, so any head goes on where another has left off.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

import structlog
from sollol.errors import SollolError
from sollol.report import NodeStatus, Pool

from sollold import drain

log = structlog.get_logger(__name__)

LOOK_AGAIN_S = 1.0


class Agent(Protocol):
    async def stop_when_idle(self, instance_id: str) -> bool: ...


class ClusterView(Protocol):
    def statuses(self) -> tuple[NodeStatus, ...]: ...
    def status(self, node_id: str) -> NodeStatus | None: ...
    def link(self, node_id: str) -> Agent: ...


class Drainer:
    """The loop.

    Args:
        in_use: How many of the pool's slots this head has given out; such a pool is not asked about.
        forget: Told of every pool that is stopped.
    """

    def __init__(self, nodes: ClusterView, *, in_use: Callable[[str], int], forget: Callable[[str], None]) -> None:
        self._nodes, self._in_use, self._forget = nodes, in_use, forget
        self._wanted = asyncio.Event()

    def on_node_changed(self, node_id: str) -> None:
        """It reported, was lost or forgotten."""
        status = self._nodes.status(node_id)
        if status is not None and status.report.draining:
            self._wanted.set()

    async def run(self) -> None:
        """Stop what is idle, again and again while there is anything to stop, until cancelled."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            while pools := drain.to_stop(self._nodes.statuses()):
                idle = [pool for pool in pools if not self._in_use(pool.instance.instance_id)]
                await asyncio.gather(*(self._stop(pool) for pool in idle))
                await asyncio.sleep(LOOK_AGAIN_S)

    async def _stop(self, pool: Pool) -> None:
        instance_id = pool.instance.instance_id
        try:
            stopped = await self._nodes.link(pool.node_id).stop_when_idle(instance_id)
        except SollolError as error:  # looked at again as long as the node lists it
            log.warning("pool_not_drained", node=pool.node_id, pool=instance_id, why=str(error))
            return
        if stopped:
            self._forget(instance_id)
            log.info("pool_drained", node=pool.node_id, pool=instance_id)
