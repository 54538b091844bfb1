"""Which pool answers a request: a warm one with a free slot, else the queue, else one load for everybody who waits.

One queue per model, first come first served. `_pump` is the only place that hands out slots and starts loads; every
event (a request, a finished stream, a report, a load's end) only calls it.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import structlog
from sollol.errors import Reason, Refusal, SollolError, refuse
from sollol.report import Instance, InstanceState, NodeStatus, PlacementWish, Pool, Progress

from sollold.loading import LoadedPool

log = structlog.get_logger(__name__)

QUEUE_RETRY_AFTER_S = 5.0
GONE_REMEMBERED = 4096
QUEUED = Progress(state="queued")


class ClusterView(Protocol):
    def statuses(self) -> tuple[NodeStatus, ...]: ...


@dataclass(eq=False)
class _PoolSlots:
    """One ready pool and how many of its slots this head uses."""

    node_id: str
    instance: Instance
    used: int = 0


@dataclass(eq=False)
class _Waiter:
    granted: "asyncio.Future[Lease]"
    on_progress: Callable[[Progress], None]


@dataclass(eq=False)
class _ModelQueue:
    waiters: deque[_Waiter] = field(default_factory=deque)
    load: asyncio.Task[None] | None = None
    progress: Progress = QUEUED


class Lease:
    """One slot of one pool, held for the life of one stream. `release` may be called more than once."""

    def __init__(self, pools: "Pools", model: str, slots: _PoolSlots) -> None:
        self.model = model
        self.node_id = slots.node_id
        self.instance_id = slots.instance.instance_id
        self._pools = pools
        self._slots: _PoolSlots | None = slots

    def release(self) -> None:
        if self._slots is not None:
            self._slots.used -= 1
            self._slots = None
            self._pools.pump(self.model)


class Pools:
    """Owner of the head's queues. The pools themselves are what the agents report."""

    def __init__(
        self,
        nodes: ClusterView,
        *,
        load: Callable[[PlacementWish, Callable[[Progress], None]], Awaitable[LoadedPool]],
        max_queue: int,
    ) -> None:
        self._nodes = nodes
        self._load = load
        self._max_queue = max_queue
        self._queues: dict[str, _ModelQueue] = {}
        self._pools: dict[str, _PoolSlots] = {}
        # Pools that failed a stream or were unloaded: never chosen again, whatever an older report says.
        self._gone: set[str] = set()
        # Pools that a load of ours made ready and that no report has listed yet.
        self._unreported: set[str] = set()

    async def acquire(self, model: str, on_progress: Callable[[Progress], None]) -> Lease:
        """Return a slot of a ready pool of `model` (a canonical name), loading one when there is none.

        Raises:
            SollolError: QUEUE_FULL, or why the model could not be loaded.
        """
        queue = self._queues.setdefault(model, _ModelQueue())
        if len(queue.waiters) >= self._max_queue:
            raise refuse(
                Reason.QUEUE_FULL,
                f"{len(queue.waiters)} requests already wait for {model}; ask again later or add nodes",
                retryable=True,
                retry_after_s=QUEUE_RETRY_AFTER_S,
                numbers={"waiting": len(queue.waiters)},
            )
        waiter = _Waiter(asyncio.get_running_loop().create_future(), on_progress)
        queue.waiters.append(waiter)
        self.pump(model)
        if not waiter.granted.done():
            on_progress(queue.progress)
        try:
            return await waiter.granted
        except asyncio.CancelledError:
            self._give_up(queue, waiter)
            raise

    def _give_up(self, queue: _ModelQueue, waiter: _Waiter) -> None:
        if waiter in queue.waiters:
            queue.waiters.remove(waiter)
        elif waiter.granted.done() and not waiter.granted.cancelled() and waiter.granted.exception() is None:
            waiter.granted.result().release()

    async def ensure_ready(self, wish: PlacementWish, on_progress: Callable[[Progress], None]) -> Pool:
        """Load the model unless a pool of it is ready; take no slot. Joins a load in flight."""
        queue = self._queues.setdefault(wish.model, _ModelQueue())
        self._refresh()
        ready = self._ready(wish.model)
        if ready:
            return Pool(node_id=ready[0].node_id, instance=ready[0].instance)
        if queue.load is not None:
            return await self._joined(wish.model, on_progress)
        pool = await self._load(wish, on_progress)
        self._adopt(pool)
        self.pump(wish.model)
        return Pool(node_id=pool.node_id, instance=pool.instance)

    async def _joined(self, model: str, on_progress: Callable[[Progress], None]) -> Pool:
        lease = await self.acquire(model, on_progress)
        slots = self._pools[lease.instance_id]
        lease.release()
        return Pool(node_id=slots.node_id, instance=slots.instance)

    def forget(self, instance_id: str) -> None:
        """This pool failed or was stopped: never choose it again."""
        if len(self._gone) > GONE_REMEMBERED:
            self._gone.clear()
        self._gone.add(instance_id)
        self._unreported.discard(instance_id)
        self._pools.pop(instance_id, None)

    def instances_of(self, model: str) -> tuple[Pool, ...]:
        """Every pool of the model that runs or starts, on every node."""
        live = {InstanceState.STARTING, InstanceState.READY}
        return tuple(pool for pool in self.all() if pool.instance.model == model and pool.instance.state in live)

    def all(self) -> tuple[Pool, ...]:
        return tuple(
            Pool(node_id=status.report.node_id, instance=instance)
            for status in self._nodes.statuses()
            for instance in status.report.instances
        )

    def on_nodes_changed(self) -> None:
        """A report came or a node was lost: serve the queues again."""
        self._refresh()
        for model in [model for model, queue in self._queues.items() if queue.waiters]:
            self.pump(model)

    async def close(self) -> None:
        """Refuse everybody who waits; end the loads in flight."""
        loads = [queue.load for queue in self._queues.values() if queue.load is not None]
        for queue in self._queues.values():
            _fail(queue, refuse(Reason.SHUTTING_DOWN, "this head is shutting down", retryable=True).refusal)
        for task in loads:
            task.cancel()
        await asyncio.gather(*loads, return_exceptions=True)

    def pump(self, model: str) -> None:
        """Hand free slots of ready pools to waiters in order; start a load when waiters have no pool at all."""
        queue = self._queues.get(model)
        if queue is None:
            return
        while queue.waiters:
            ready = self._ready(model)
            free = [slots for slots in ready if slots.used < slots.instance.parallel]
            if not free:
                if not ready and queue.load is None and not self._starts_elsewhere(model):
                    queue.load = asyncio.create_task(self._run_load(model, queue), name=f"load {model}")
                return
            waiter = queue.waiters.popleft()
            if waiter.granted.done():
                continue
            slots = max(free, key=lambda item: (item.instance.parallel - item.used, item.instance.instance_id))
            slots.used += 1
            waiter.granted.set_result(Lease(self, model, slots))

    async def _run_load(self, model: str, queue: _ModelQueue) -> None:
        """The single load of a model: its end, good or bad, is everybody's."""

        def told(progress: Progress) -> None:
            queue.progress = progress
            for waiter in queue.waiters:
                waiter.on_progress(progress)

        failure: Refusal | None = None
        try:
            self._adopt(await self._load(PlacementWish(model=model), told))
        except SollolError as error:
            failure = error.refusal
        except Exception as error:
            # A bug must reach the waiters as an error: without this they would wait for a task that is gone.
            log.exception("load_crashed", model=model)
            failure = refuse(Reason.INTERNAL, f"loading {model} failed inside the head: {error!r}").refusal
        finally:
            queue.load = None
            queue.progress = QUEUED
        if failure is not None:
            _fail(queue, failure)
        self.pump(model)

    def _adopt(self, pool: LoadedPool) -> None:
        """Use a pool that just became ready, before any report lists it."""
        instance_id = pool.instance.instance_id
        if instance_id not in self._pools:
            self._pools[instance_id] = _PoolSlots(pool.node_id, pool.instance)
            self._unreported.add(instance_id)

    def _starts_elsewhere(self, model: str) -> bool:
        """Another head is loading it: its next report serves our waiters or makes us load."""
        return any(
            instance.model == model and instance.state is InstanceState.STARTING
            for status in self._nodes.statuses()
            if status.connected
            for instance in status.report.instances
        )

    def _ready(self, model: str) -> list[_PoolSlots]:
        return [slots for slots in self._pools.values() if slots.instance.model == model]

    def _refresh(self) -> None:
        """Make `_pools` what the connected agents report as READY, keeping the slot counts."""
        reported: dict[str, Instance] = {}
        owners: dict[str, str] = {}
        for status in self._nodes.statuses():
            for instance in status.report.instances:
                reported[instance.instance_id] = instance
                if status.connected and instance.state is InstanceState.READY:
                    owners[instance.instance_id] = status.report.node_id
        self._unreported -= set(reported)
        self._drop(instance_id for instance_id in set(self._pools) - set(owners) - self._unreported)
        for instance_id, node_id in owners.items():
            if instance_id in self._gone:
                continue
            slots = self._pools.setdefault(instance_id, _PoolSlots(node_id, reported[instance_id]))
            slots.instance = reported[instance_id]

    def _drop(self, instance_ids: Iterable[str]) -> None:
        for instance_id in instance_ids:
            self._pools.pop(instance_id, None)


def _fail(queue: _ModelQueue, refusal: Refusal) -> None:
    while queue.waiters:
        waiter = queue.waiters.popleft()
        if not waiter.granted.done():
            waiter.granted.set_exception(SollolError(refusal))
