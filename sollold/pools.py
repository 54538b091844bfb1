"""Which pool answers a request: a warm one with a free slot, else the queue, else one load for everybody who waits.

One queue per model; first come first served, several keys by turns. `pump` is the only place that hands out slots and
starts loads; every event (a request, a finished stream, a report, a load's end) only calls it.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

import structlog
from sollol.errors import Reason, Refusal, SollolError, refuse
from sollol.inference import Progress
from sollol.report import Instance, InstanceKind, InstanceState, NodeStatus, PlacementWish, Pool

from sollold.load_progress import progress_of
from sollold.numbers import GaveWayError
from sollold.pool_index import PoolIndex, PoolSlots
from sollold.queues import QUEUED, Lease, ModelQueue, Waiter, Watcher
from sollold.scaling import Demand, LoadFor, extra_retry_s, load_for

log = structlog.get_logger(__name__)

QUEUE_RETRY_AFTER_S = 5.0
LIVE = frozenset({InstanceState.STARTING, InstanceState.READY, InstanceState.STOPPING})


class ClusterView(Protocol):
    def statuses(self) -> tuple[NodeStatus, ...]: ...
    def status(self, node_id: str) -> NodeStatus | None: ...


class FreeNumbers(Protocol):
    def lowest_free(self, model: str) -> int: ...


class Pools:
    """Owner of the head's queues. The pools themselves are what the agents report.

    Args:
        load: Starts the pool of a number and returns it READY; cancelling it leaves nothing behind.
        numbers: Knows which numbers are free.
        max_queue: Waiting requests per model.
        limit: How many pools of a model its requests alone may bring up; operators may ask for more.
    """

    def __init__(
        self,
        nodes: ClusterView,
        *,
        load: Callable[[PlacementWish, int, Callable[[Progress], None]], Awaitable[Pool]],
        numbers: FreeNumbers,
        max_queue: int,
        limit: Callable[[str], int] = lambda _model: 1,
    ) -> None:
        self._nodes = nodes
        self._load = load
        self._numbers = numbers
        self._max_queue = max_queue
        self._limit = limit
        self._index = PoolIndex()
        self._queues: dict[str, ModelQueue] = {}
        self._closed = False

    async def acquire(self, model: str, on_progress: Callable[[Progress], None], *, asker: str = "") -> Lease:
        """Return a slot of a ready pool of `model` (a canonical name), loading one when there is none.

        Those who wait get slots in the order in which they came, and by turns where they have different askers.

        A load goes on when all who waited for it have left: a client that gives up too early and asks again would
        otherwise never get its model.

        Raises:
            SollolError: QUEUE_FULL, SHUTTING_DOWN, or why the model could not be loaded.
        """
        queue = self._open_queue(model)
        if not queue.waiters and (slots := self._index.take(model)) is not None:
            return Lease(slots, self._released)
        self._make_room(queue, asker)
        waiter = Waiter(asyncio.get_running_loop().create_future(), on_progress)
        queue.waiters.add(asker, waiter)
        try:
            self.pump(model)
            on_progress(queue.progress)
            return await waiter.granted
        except BaseException:
            self._give_up(queue, waiter)
            raise

    def limit_queue(self, max_queue: int) -> None:
        """For requests that come from now on."""
        self._max_queue = max_queue

    def _open_queue(self, model: str) -> ModelQueue:
        if self._closed:
            raise SollolError(_shutting_down())
        return self._queues.setdefault(model, ModelQueue(model))

    def _make_room(self, queue: ModelQueue, asker: str) -> None:
        """In a queue that is full, whoever has most there gives one place to others."""
        waiting = len(queue.waiters)
        if waiting < self._max_queue:
            return
        full = refuse(
            Reason.QUEUE_FULL,
            f"{waiting} requests already wait for {queue.model}; ask again later or add nodes",
            retryable=True,
            retry_after_s=QUEUE_RETRY_AFTER_S,
            numbers={"waiting": waiting},
        )
        crowded_out = queue.waiters.crowded_out_by(asker)
        if crowded_out is None:
            raise full
        queue.waiters.remove(crowded_out)
        if not crowded_out.granted.done():
            crowded_out.granted.set_exception(full)

    def _give_up(self, queue: ModelQueue, waiter: Waiter) -> None:
        queue.waiters.remove(waiter)
        granted = waiter.granted
        if granted.done() and not granted.cancelled() and granted.exception() is None:
            granted.result().release()  # it was granted in the moment of the cancellation

    def _released(self, slots: PoolSlots) -> None:
        self._index.release(slots)
        self.pump(slots.instance.model)

    async def ensure_ready(
        self, wish: PlacementWish, on_progress: Callable[[Progress], None], *, count: int = 1
    ) -> tuple[Pool, ...]:
        """Return every ready pool of the model, loading as many as are missing to `count`; take no slot.

        Joins the load in flight whatever its wish, and requests that come meanwhile join this one.

        Raises:
            SollolError: SHUTTING_DOWN, or why a pool could not be loaded.
        """
        queue = self._open_queue(wish.model)
        ready = self._index.ready(wish.model)
        if len(ready) >= count:
            return ready
        watcher = Watcher(wish, count, asyncio.get_running_loop().create_future(), on_progress)
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
        model = self._index.forget(instance_id, why)
        if model is not None:
            self.pump(model)  # perhaps they all waited for just this pool

    def newest(self, instance: Instance) -> Instance:
        """A reported instance as this head knows it now: its own loads and streams are newer than any report."""
        return self._index.newest(instance)

    def in_use(self, instance_id: str) -> int:
        """How many of this pool's slots this head has given out."""
        return self._index.in_use(instance_id)

    def instances_of(self, model: str) -> tuple[Pool, ...]:
        """Every pool of the model that has a process, on every node."""
        return tuple(pool for pool in self.all() if pool.instance.model == model and pool.instance.state in LIVE)

    def all(self) -> tuple[Pool, ...]:
        return tuple(
            Pool(node_id=status.report.node_id, instance=self._index.newest(instance))
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
                    queue.tell(progress_of(instance, pending.node_id, self._nodes.status))

    async def close(self) -> None:
        """Refuse everybody, those who wait and those to come; end the loads in flight."""
        self._closed = True
        loads = [queue.load for queue in self._queues.values() if queue.load is not None]
        for queue in self._queues.values():
            queue.close(_shutting_down())
        for load in loads:
            load.cancel()
        await asyncio.gather(*loads, return_exceptions=True)

    def pump(self, model: str) -> None:
        """Hand free slots to waiters in order, then load another pool when `scaling` says so."""
        queue = self._queues.get(model)
        if queue is None:
            return
        for waiter in queue.in_order():
            slots = self._index.take(model)
            if slots is None:
                break
            waiter.granted.set_result(Lease(slots, self._released))
        if queue.watchers:
            queue.announce(self._index.ready(model))
        if (queue.waiters or queue.watchers) and not (queue.load or self._closed):
            self._load_more(queue)

    def _load_more(self, queue: ModelQueue) -> None:
        ready, to_come = self._index.counts(queue.model)
        demand = Demand(
            waiting=bool(queue.waiters),
            asked=queue.asked(),
            ready=ready,
            to_come=to_come,
            limit=self._limit(queue.model),
            held_off=queue.resume is not None,
        )
        whose = load_for(demand)
        if whose is None:
            return
        requests = whose is LoadFor.REQUESTS
        wish = PlacementWish(model=queue.model) if requests else queue.wish_for_more_than(ready)
        # By what is known now: when another head takes it meanwhile, this load gives way and adds no pool too many.
        number = self._numbers.lowest_free(queue.model)
        log.info("pool_wanted", model=queue.model, number=number, wanted_for=whose, waiting=len(queue.waiters))
        queue.load = asyncio.create_task(self._run_load(queue, wish, number), name=f"load {queue.model}")
        # Not in the task itself: one that is cancelled before its first step runs nothing of its own.
        queue.load.add_done_callback(lambda load: self._load_over(queue, wish, load))

    async def _run_load(self, queue: ModelQueue, wish: PlacementWish, number: int) -> Refusal | None:
        """The single load of a model; returns why it failed."""
        try:
            self._index.adopt(await self._load(wish, number, queue.tell))
        except GaveWayError as error:
            log.info("load_gave_way", model=queue.model, why=str(error))
        except SollolError as error:
            return error.refusal
        except Exception as error:
            log.exception("load_crashed", model=queue.model)
            return refuse(Reason.INTERNAL, f"loading {queue.model} failed inside the head: {error!r}").refusal
        return None

    def _load_over(self, queue: ModelQueue, wish: PlacementWish, load: asyncio.Task[Refusal | None]) -> None:
        """However it ended: its end is everybody's, unless other pools serve those who wait."""
        queue.load = None
        if load.cancelled():
            self._loaded(queue, None, _stopped(queue.model))
        else:
            self._loaded(queue, wish, load.result())

    def _loaded(self, queue: ModelQueue, wish: PlacementWish | None, failure: Refusal | None) -> None:
        """Tell those whom it concerns how a load of this wish ended; None: somebody stopped it."""
        if failure is None:
            queue.extra_failures = 0
            self.pump(queue.model)
            queue.tell(QUEUED)
            return
        queue.progress = QUEUED
        ready, to_come = self._index.counts(queue.model)
        if ready and wish in (None, PlacementWish(model=queue.model)):
            self._hold_off(queue, failure)
        queue.fail(failure, wish, at_hand=ready + to_come)
        self.pump(queue.model)

    def _hold_off(self, queue: ModelQueue, failure: Refusal) -> None:
        """Leave it at the pools there are for a while: those who wait are served by these."""
        queue.extra_failures += 1
        pause_s = extra_retry_s(queue.extra_failures, failure.retry_after_s)
        log.warning("extra_pool_failed", model=queue.model, reason=failure.reason, again_in_s=pause_s)
        if queue.resume is None and not self._closed:
            queue.resume = asyncio.get_running_loop().call_later(pause_s, self._resume, queue)

    def _resume(self, queue: ModelQueue) -> None:
        queue.resume = None
        self.pump(queue.model)


def _stopped(model: str) -> Refusal:
    return refuse(Reason.STOPPED, f"loading {model} was stopped; ask again to load it", retryable=True).refusal


def _shutting_down() -> Refusal:
    return refuse(Reason.SHUTTING_DOWN, "this head is shutting down", retryable=True).refusal
