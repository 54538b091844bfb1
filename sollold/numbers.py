"""Which number each pool of a model gets, and which of two pools with the same number gives way.

A number is a seat: the lowest that no pool of the model has. Heads know of each other's pools by the agents' reports
alone, so two that start a pool in the same moment give it the same number; as soon as one shows up in the other's
reports, one of them gives way, the same one on both sides. That keeps numbers apart and the number of pools within
what was asked for.
"""

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import structlog
from sollol.report import Instance, InstanceKind, InstanceState, NodeStatus

log = structlog.get_logger(__name__)

ENDED_REMEMBERED = 4096
_SEATED = frozenset({InstanceState.STARTING, InstanceState.READY, InstanceState.STOPPING, InstanceState.LOST})
_SERVING = frozenset({InstanceState.STARTING, InstanceState.READY})


class ClusterView(Protocol):
    def statuses(self) -> tuple[NodeStatus, ...]: ...
    def status(self, node_id: str) -> NodeStatus | None: ...


class GaveWayError(Exception):
    """Raised when another head's pool has the number of the one that was being started here."""


@dataclass(eq=False)
class _Start:
    pool_id: str
    model: str
    number: int
    scope: asyncio.Timeout
    rival: str = ""


class PoolNumbers:
    """Owner of the numbers of pools that this head is starting; those of all others are in the reports."""

    def __init__(self, nodes: ClusterView) -> None:
        self._nodes = nodes
        self._starts: dict[str, _Start] = {}
        self._ended: dict[str, None] = {}

    def lowest_free(self, model: str) -> int:
        """The lowest number that no pool of the model has, on any node, ready or not."""
        return lowest_free(model, _instances(self._nodes.statuses()), self._ended)

    @asynccontextmanager
    async def held(self, pool_id: str, model: str, number: int) -> AsyncIterator[None]:
        """Hold the number for a pool that is started in this block.

        Raises:
            GaveWayError: another head's pool has it; the block was cancelled, and what it started must be stopped.
        """
        start = _Start(pool_id, model, number, asyncio.timeout(None))
        self._starts[pool_id] = start
        try:
            async with start.scope:
                self._look(start, self._nodes.statuses())
                yield
        except BaseException as error:
            self._ended[pool_id] = None  # reports show it for a moment longer: it is nobody's rival
            if len(self._ended) > ENDED_REMEMBERED:
                del self._ended[next(iter(self._ended))]
            if start.rival and isinstance(error, TimeoutError):
                raise GaveWayError(f"{pool_id} gave way to {start.rival}: both are pool {number} of {model}") from error
            raise
        finally:
            del self._starts[pool_id]

    def on_node_changed(self, node_id: str) -> None:
        """It reported, was lost or forgotten: another head may have started the same pool there."""
        status = self._nodes.status(node_id) if self._starts else None
        if status is not None:
            for start in self._starts.values():
                self._look(start, (status,))

    def _look(self, start: _Start, statuses: Iterable[NodeStatus]) -> None:
        if start.rival:
            return
        in_reach = (status for status in statuses if status.connected)
        others = (each for each in _instances(in_reach) if each.instance_id not in self._ended)
        rival = rival_of(start.pool_id, start.model, start.number, others)
        if rival is not None:
            start.rival = rival.instance_id
            log.info("pool_gives_way", model=start.model, number=start.number, pool=start.pool_id, to=start.rival)
            start.scope.reschedule(asyncio.get_running_loop().time())


def lowest_free(model: str, instances: Iterable[Instance], ended: Collection[str] = ()) -> int:
    taken = {
        each.pool_number
        for each in instances
        if each.model == model and each.state in _SEATED and each.instance_id not in ended
    }
    return next(number for number in range(len(taken) + 1) if number not in taken)


def rival_of(pool_id: str, model: str, number: int, instances: Iterable[Instance]) -> Instance | None:
    """The pool to which a starting one gives way: one of its number that is ready, else of a lower id."""
    for each in instances:
        same = each.model == model and each.pool_number == number and each.instance_id != pool_id
        if same and each.state in _SERVING and (each.state is InstanceState.READY or each.instance_id < pool_id):
            return each
    return None


def _instances(statuses: Iterable[NodeStatus]) -> Iterable[Instance]:
    return (
        instance
        for status in statuses
        for instance in status.report.instances
        if instance.kind is InstanceKind.COORDINATOR
    )
