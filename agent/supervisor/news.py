"""Who is told of every change of every instance: those who watch one, and those who want to know of all."""

import asyncio
from collections.abc import AsyncIterator, Callable

from sollol.report import Instance

from agent.supervisor.state import SETTLED


class News:
    def __init__(self) -> None:
        self._watchers: dict[str, set[asyncio.Queue[Instance]]] = {}
        self._subscribers: list[Callable[[Instance], None]] = []

    def tell(self, instance: Instance) -> None:
        for changes in self._watchers.get(instance.instance_id, ()):
            changes.put_nowait(instance)
        for callback in self._subscribers:
            callback(instance)

    async def watch(self, first: Instance) -> AsyncIterator[Instance]:
        """Yield `first`, then every change of that instance; ends after a state that changes nothing by itself."""
        # Bounded by nature: a life has a handful of states and at most a hundred percents.
        changes: asyncio.Queue[Instance] = asyncio.Queue()
        changes.put_nowait(first)
        watchers = self._watchers.setdefault(first.instance_id, set())
        watchers.add(changes)
        try:
            while True:
                instance = await changes.get()
                yield instance
                if instance.state in SETTLED:
                    return
        finally:
            watchers.discard(changes)
            if not watchers and self._watchers.get(first.instance_id) is watchers:
                del self._watchers[first.instance_id]

    def subscribe(self, callback: Callable[[Instance], None]) -> None:
        """Call `callback` with every change."""
        self._subscribers.append(callback)
