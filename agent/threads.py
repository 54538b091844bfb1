"""Blocking readings (drivers, sysfs, slow disks) kept off the event loop and away from the way out.

A driver can hang for ever. asyncio's own threads are joined when the process leaves, so one such call would hold the
agent's exit: these are daemon threads, one call at a time for each reading.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Reading(NamedTuple, Generic[T]):
    """A value and the seconds since it was read."""

    value: T
    age_s: float


class SlowReading(Generic[T]):
    """Calls `read` in a thread; answers within `deadline_s`, with the newest value that ever came back.

    Args:
        read: The blocking call. What it raises is raised by `newest`.
        initial: The answer before the first value.
    """

    def __init__(
        self,
        read: Callable[[], T],
        *,
        initial: T,
        name: str,
        deadline_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read = read
        self._name = name
        self._deadline_s = deadline_s
        self._clock = clock
        self._value = initial
        self._read_s = clock()
        self._pending: asyncio.Future[tuple[T, float]] | None = None
        self._overdue = False

    @property
    def overdue(self) -> bool:
        """A call has passed its deadline and has still not come back."""
        return self._overdue

    async def newest(self) -> Reading[T]:
        """Read now, or give the last value with its age when the call does not come back in time.

        While an overdue call is still out no other is made and nobody waits for it again.
        """
        pending = self._pending
        if pending is None:
            pending = self._pending = self._begin()
        elif self._overdue and not pending.done():
            return self.last()
        done, _ = await asyncio.wait((pending,), timeout=self._deadline_s)
        self._overdue = not done
        if done:
            if self._pending is pending:
                self._pending = None
            self._value, self._read_s = pending.result()
        return self.last()

    def last(self) -> Reading[T]:
        """The newest value that ever came back."""
        return Reading(self._value, self._clock() - self._read_s)

    def _begin(self) -> asyncio.Future[tuple[T, float]]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[tuple[T, float]] = loop.create_future()
        future.add_done_callback(_seen)  # whoever waits for it may have ended

        def run() -> None:
            deliver: Callable[[], None]
            try:
                value = self._read()
            except Exception as error:  # noqa: BLE001 - carried to the waiter, who knows what it can handle
                deliver = partial(future.set_exception, error)
            else:
                deliver = partial(future.set_result, (value, self._clock()))
            with suppress(RuntimeError):  # the loop has closed meanwhile: nobody waits any more
                loop.call_soon_threadsafe(deliver)

        threading.Thread(target=run, name=self._name, daemon=True).start()
        return future


def _seen(future: asyncio.Future[tuple[T, float]]) -> None:
    """A failure that nobody fetches is none to complain of: asyncio would, when it forgets the future."""
    if not future.cancelled():
        future.exception()
