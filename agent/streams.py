"""How many token streams each instance of this node carries now, over all heads."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Streams:
    """The relay counts; everybody else reads."""

    def __init__(self) -> None:
        self._active: Counter[str] = Counter()
        self._listeners: list[Callable[[str, int], None]] = []

    def active(self, instance_id: str) -> int:
        return self._active[instance_id]

    def subscribe(self, listener: Callable[[str, int], None]) -> None:
        """Have `listener` called with an instance and how many streams it has, with every one that begins or ends."""
        self._listeners.append(listener)

    @contextmanager
    def counted(self, instance_id: str) -> Iterator[None]:
        """One more stream, until the block is left."""
        self._change(instance_id, 1)
        try:
            yield
        finally:
            self._change(instance_id, -1)

    def _change(self, instance_id: str, by: int) -> None:
        active = self._active[instance_id] + by
        if active:
            self._active[instance_id] = active
        else:
            del self._active[instance_id]
        for listener in self._listeners:
            listener(instance_id, active)
