"""Who waits for a model: requests for a slot, operators for pools. `Pools` is the owner, these are its parts."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from sollol.errors import Refusal, SollolError
from sollol.inference import Progress
from sollol.report import PlacementWish, Pool

from sollold.pool_index import PoolSlots
from sollold.turns import Turns

QUEUED = Progress(state="queued")


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
class Waiter:
    """A request that waits for a slot."""

    granted: asyncio.Future[Lease]
    on_progress: Callable[[Progress], None]


@dataclass(eq=False)
class Watcher:
    """An operator who waits until `count` pools are ready, loaded under this wish when nothing else loads them."""

    wish: PlacementWish
    count: int
    ready: asyncio.Future[tuple[Pool, ...]]
    on_progress: Callable[[Progress], None]


@dataclass(eq=False)
class ModelQueue:
    """Everybody who waits for one model, and this head's load of it.

    `extra_failures` counts loads beyond the first pool that failed in a row; `resume` runs while none is tried again.
    """

    model: str
    waiters: Turns[Waiter] = field(default_factory=Turns)
    watchers: dict[Watcher, None] = field(default_factory=dict)
    load: asyncio.Task[Refusal | None] | None = None
    progress: Progress = QUEUED
    extra_failures: int = 0
    resume: asyncio.TimerHandle | None = None

    def in_order(self) -> Iterator[Waiter]:
        """Take the waiters that still want a slot, one by one, as it is their askers' turn."""
        while self.waiters:
            waiter = self.waiters.first()
            if waiter.granted.done():
                self.waiters.remove(waiter)
            else:
                yield waiter
                self.waiters.served(waiter)

    def asked(self) -> int:
        """The most pools that any operator waits for."""
        return max((watcher.count for watcher in self.watchers), default=0)

    def wish_for_more_than(self, ready: int) -> PlacementWish:
        """The first operator's who waits for more pools than are ready."""
        return next(watcher.wish for watcher in self.watchers if watcher.count > ready)

    def tell(self, progress: Progress) -> None:
        self.progress = progress
        everybody: list[Waiter | Watcher] = [*self.waiters, *self.watchers]
        for each in everybody:
            each.on_progress(progress)

    def announce(self, pools: Sequence[Pool]) -> None:
        """Tell the operators who wait for no more pools than these."""
        for watcher in [each for each in self.watchers if each.count <= len(pools)]:
            del self.watchers[watcher]
            if not watcher.ready.done():
                watcher.ready.set_result(tuple(pools))

    def fail(self, refusal: Refusal, wish: PlacementWish | None = None, *, at_hand: int = 0) -> None:
        """Fail those who asked for just this (None: everybody) and whom the `at_hand` pools do not serve.

        Args:
            refusal: Why.
            wish: What was tried; whoever asked for something else is still to be tried.
            at_hand: How many pools are ready or to come.
        """
        for watcher in [each for each in self.watchers if wish in (None, each.wish) and each.count > at_hand]:
            del self.watchers[watcher]
            if not watcher.ready.done():
                watcher.ready.set_exception(SollolError(refusal))
        if at_hand or wish not in (None, PlacementWish(model=self.model)):
            return
        for waiter in self.waiters:
            self.waiters.remove(waiter)
            if not waiter.granted.done():
                waiter.granted.set_exception(SollolError(refusal))

    def close(self, refusal: Refusal) -> None:
        """Refuse everybody, for good."""
        self.fail(refusal)
        if self.resume is not None:
            self.resume.cancel()
