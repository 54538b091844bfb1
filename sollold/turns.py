"""Whose turn it is: a queue of queues, one for each asker, served in turn. Pure.

Within one asker first come is first served; between askers each gets one, then the next does. One alone gets all.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Turns(Generic[T]):
    """What waits, by asker."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, OrderedDict[T, None]] = OrderedDict()  # the next asker first; none is empty
        self._askers: dict[T, str] = {}

    def __len__(self) -> int:
        return len(self._askers)

    def __iter__(self) -> Iterator[T]:
        """All that waits, in no particular order."""
        return iter(tuple(self._askers))

    def add(self, asker: str, item: T) -> None:
        """Let it wait, as the last one of its asker's."""
        self._queues.setdefault(asker, OrderedDict())[item] = None
        self._askers[item] = asker

    def first(self) -> T:
        """Whose turn it is. Raises StopIteration when nothing waits."""
        return next(iter(next(iter(self._queues.values()))))

    def served(self, item: T) -> None:
        """It had its turn: its asker's next one comes after everybody else's."""
        asker = self._askers.get(item)
        self.remove(item)
        if asker is not None and asker in self._queues:
            self._queues.move_to_end(asker)

    def remove(self, item: T) -> None:
        """It waits no more, and had no turn; what does not wait is left alone."""
        asker = self._askers.pop(item, None)
        if asker is None:
            return
        queue = self._queues[asker]
        del queue[item]
        if not queue:
            del self._queues[asker]

    def crowded_out_by(self, asker: str) -> T | None:
        """What gives its place to one more of this asker's, in a queue that is full.

        The newest of whoever has most there, if that is more than the asker would have then.
        """
        longest = max(self._queues.values(), key=len, default=None)
        own = len(self._queues.get(asker, ()))
        if longest is None or len(longest) <= own + 1:
            return None
        return next(reversed(longest))
