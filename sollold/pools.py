"""Which pool answers a request: a warm one with a free slot, else the queue, else one load for everybody who waits.

One queue per model, first come first served. `pump` is the only place that hands out slots and starts loads; every
event (a request, a finished stream, a report, a load's end) only calls it.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import structlog
from sollol.errors import Reason, Refusal, SollolError, refuse
from sollol.report import InstanceKind, InstanceState, NodeStatus, PlacementWish, Pool, Progress

from sollold.pool_index import PoolIndex, PoolSlots

log = structlog.get_logger(__name__)

QUEUE_RETRY_AFTER_S = 5.0
QUEUED = Progress(state="queued")
LIVE = frozenset({InstanceState.STARTING, InstanceState.READY, InstanceState.STOPPING})


class ClusterView(Protocol):
    def statuses(self) -> tuple[NodeStatus, ...]: ...
    def status(self, node_id: str) -> NodeStatus | None: ...


class Lease:
    """One slot of one pool, held for the life of one stream. `release` may be called more than once."""

    def __init__(self, slots: PoolSlots, on_release: Callable[[PoolSlots], None]) -> None:
        self.model = slots.instance.model
        self.node_id = slots.node_id
        self.instance_id = slots.instance.instance_id
        self._on_release = on_release
        self._slots: PoolSlots | None = slots

    def release(self) -> None:
        slots, self._slots = self._slots, None
        if slots is not None:
            self._on_release(slots)


@dataclass(eq=False)
class _Waiter:
    """A request that waits for a slot."""

    granted: "asyncio.Future[Lease]"
    on_progress: Callable[[Progress], None]


@dataclass(eq=False)
class _Watcher:
    """An operator who waits for any pool to be ready, loaded under this wish when nothing else loads one."""

    wish: PlacementWish
    ready: "asyncio.Future[Pool]"
    on_progress: Callable[[Progress], None]


@dataclass(eq=False)
class _ModelQueue:
    model: str
    waiters: "OrderedDict[_Waiter, None]" = field(default_factory=OrderedDict)
    watchers: dict[_Watcher, None] = field(default_factory=dict)
    load: asyncio.Task[None] | None = None
    progress: Progress = QUEUED

    def in_order(self) -> Iterator[_Waiter]:
        """Take the waiters that still want a slot, one by one."""
        while self.waiters:
            waiter = next(iter(self.waiters))
            if not waiter.granted.done():
                yield waiter
            self.waiters.pop(waiter, None)

    def tell(self, progress: Progress) -> None:
        self.progress = progress
        everybody: list[_Waiter | _Watcher] = [*self.waiters, *self.watchers]
        for each in everybody:
            each.on_progress(progress)

    def announce(self, pool: Pool) -> None:
        for watcher in self.watchers:
            if not watcher.ready.done():
                watcher.ready.set_result(pool)
        self.watchers.clear()

    def fail(self, refusal: Refusal, wish: PlacementWish | None = None) -> None:
        """Fail everybody, or only those who asked for this when the wish was a special one."""
        special = wish is not None and wish != PlacementWish(model=self.model)
        for watcher in [each for each in self.watchers if not special or each.wish == wish]:
            del self.watchers[watcher]
            if not watcher.ready.done():
                watcher.ready.set_exception(SollolError(refusal))
        while self.waiters and not special:
            waiter, _ = self.waiters.popitem(last=False)
            if not waiter.granted.done():
                waiter.granted.set_exception(SollolError(refusal))


class Pools:
    """Owner of the head's queues. The pools themselves are what the agents report.

    Args:
        load: Starts a pool and returns it READY; cancelling it leaves nothing behind.
        max_queue: Waiting requests per model.
    """

    def __init__(
        self,
        nodes: ClusterView,
        *,
        load: Callable[[PlacementWish, Callable[[Progress], None]], Awaitable[Pool]],
        max_queue: int,
    ) -> None:
        self._nodes = nodes
        self._load = load
        self._max_queue = max_queue
        self._index = PoolIndex()
        self._queues: dict[str, _ModelQueue] = {}
        self._closed = False

    async def acquire(self, model: str, on_progress: Callable[[Progress], None]) -> Lease:
        """Return a slot of a ready pool of `model` (a canonical name), loading one when there is none.

        A load goes on when all who waited for it have left: a client that gives up too early and asks again would
        otherwise never get its model.

        Raises:
            SollolError: QUEUE_FULL, SHUTTING_DOWN, or why the model could not be loaded.
        """
        queue = self._open_queue(model)
        if not queue.waiters and (slots := self._index.take(model)) is not None:
            return Lease(slots, self._released)
        self._check_room(queue)
        waiter = _Waiter(asyncio.get_running_loop().create_future(), on_progress)
        queue.waiters[waiter] = None
        try:
            self.pump(model)
            on_progress(queue.progress)
            return await waiter.granted
        except BaseException:
            self._give_up(queue, waiter)
            raise

    def _open_queue(self, model: str) -> _ModelQueue:
        if self._closed:
            raise SollolError(_shutting_down())
        return self._queues.setdefault(model, _ModelQueue(model))

    def _check_room(self, queue: _ModelQueue) -> None:
        waiting = len(queue.waiters)
        if waiting >= self._max_queue:
            raise refuse(
                Reason.QUEUE_FULL,
                f"{waiting} requests already wait for {queue.model}; ask again later or add nodes",
                retryable=True,
                retry_after_s=QUEUE_RETRY_AFTER_S,
                numbers={"waiting": waiting},
            )

    def _give_up(self, queue: _ModelQueue, waiter: _Waiter) -> None:
        queue.waiters.pop(waiter, None)
        granted = waiter.granted
        if granted.done() and not granted.cancelled() and granted.exception() is None:
            granted.result().release()  # it was granted in the moment of the cancellation

    def _released(self, slots: PoolSlots) -> None:
        self._index.release(slots)
        self.pump(slots.instance.model)

    async def ensure_ready(self, wish: PlacementWish, on_progress: Callable[[Progress], None]) -> Pool:
        """Return a ready pool of the model, loading one when there is none; take no slot.

        Joins the load in flight whatever its wish, and requests that come meanwhile join this one.

        Raises:
            SollolError: SHUTTING_DOWN, or why the model could not be loaded.
        """
        queue = self._open_queue(wish.model)
        ready = self._index.ready(wish.model)
        if ready is not None:
            return ready
        watcher = _Watcher(wish, asyncio.get_running_loop().create_future(), on_progress)
        queue.watchers[watcher] = None
        try:
            self.pump(wish.model)
            on_progress(queue.progress)
            return await watcher.ready
        finally:
            queue.watchers.pop(watcher, None)

    async def stop_loading(self, model: str) -> None:
        """End this head's load of the model, if there is one; return when what it started is stopped."""
        queue = self._queues.get(model)
        if queue is not None and queue.load is not None:
            load = queue.load
            load.cancel()
            await asyncio.wait({load})

    def doubt(self, instance_id: str) -> None:
        """This pool failed a stream: its agent's next report decides whether it is used again."""
        self._index.doubt(instance_id)

    def forget(self, instance_id: str, why: Refusal | None = None) -> None:
        """This pool is being stopped: never use it again. `why` when it is lost, and nothing brings it back."""
        self._index.forget(instance_id, why)

    def instances_of(self, model: str) -> tuple[Pool, ...]:
        """Every pool of the model that has a process, on every node."""
        return tuple(pool for pool in self.all() if pool.instance.model == model and pool.instance.state in LIVE)

    def all(self) -> tuple[Pool, ...]:
        return tuple(
            Pool(node_id=status.report.node_id, instance=instance)
            for status in self._nodes.statuses()
            for instance in status.report.instances
            if instance.kind is InstanceKind.COORDINATOR
        )

    def on_node_changed(self, node_id: str) -> None:
        """It reported, was lost or forgotten: serve the queues of its models again."""
        for model in self._index.update(node_id, self._nodes.status(node_id)):
            self.pump(model)
            queue, pending = self._queues.get(model), self._index.pending(model)
            if queue is not None and queue.load is None and pending is not None:
                instance = pending.instance
                if instance.state is InstanceState.STARTING:  # another head loads it
                    queue.tell(Progress(state="loading", percent=instance.percent, node_id=pending.node_id))

    async def close(self) -> None:
        """Refuse everybody, those who wait and those to come; end the loads in flight."""
        self._closed = True
        loads = [queue.load for queue in self._queues.values() if queue.load is not None]
        for queue in self._queues.values():
            queue.fail(_shutting_down())
        for load in loads:
            load.cancel()
        await asyncio.gather(*loads, return_exceptions=True)

    def pump(self, model: str) -> None:
        """Hand free slots to waiters in order; start a load when somebody waits and no pool is there or to come."""
        queue = self._queues.get(model)
        if queue is None:
            return
        for waiter in queue.in_order():
            slots = self._index.take(model)
            if slots is None:
                break
            waiter.granted.set_result(Lease(slots, self._released))
        ready = self._index.ready(model)
        if ready is not None:
            queue.announce(ready)
        elif (queue.waiters or queue.watchers) and not (queue.load or self._index.pending(model) or self._closed):
            wish = PlacementWish(model=model) if queue.waiters else next(iter(queue.watchers)).wish
            queue.load = asyncio.create_task(self._run_load(queue, wish), name=f"load {model}")

    async def _run_load(self, queue: _ModelQueue, wish: PlacementWish) -> None:
        """The single load of a model: its end, good or bad, is everybody's."""
        # Stands when this task is cancelled: however it ends, nobody waits for a load that is over.
        failure: Refusal | None = refuse(
            Reason.STOPPED, f"loading {queue.model} was stopped; ask again to load it", retryable=True
        ).refusal
        try:
            self._index.adopt(await self._load(wish, queue.tell))
            failure = None
        except SollolError as error:
            failure = error.refusal
        except Exception as error:
            log.exception("load_crashed", model=queue.model)
            failure = refuse(Reason.INTERNAL, f"loading {queue.model} failed inside the head: {error!r}").refusal
        finally:
            queue.load = None
            if failure is None:
                self.pump(queue.model)
                queue.tell(QUEUED)
            else:
                queue.progress = QUEUED
                queue.fail(failure, wish)
                self.pump(queue.model)


def _shutting_down() -> Refusal:
    return refuse(Reason.SHUTTING_DOWN, "this head is shutting down", retryable=True).refusal
