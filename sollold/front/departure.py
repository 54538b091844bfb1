"""How running requests end when the head does: in their own time while there is some, then each with a word."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from sollol.errors import Reason, refuse


class Departure:
    """Knows the requests that run; a cancelled one of them gets SHUTTING_DOWN to tell its user."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._running: set[asyncio.Task[object]] = set()
        self._leaving = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Surround what may be cut short at shutdown.

        Raises:
            SollolError: SHUTTING_DOWN, in place of the cancellation by `leave`.
        """
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if not self._leaving or task.uncancel() > 0:
                raise
            raise refuse(
                Reason.SHUTTING_DOWN, "the head is shutting down; ask again", retryable=True, retry_after_s=2
            ) from None
        finally:
            self._running.discard(task)

    async def leave(self) -> None:
        """Wait for what runs, at most the grace period; end the rest."""
        if self._running:
            await asyncio.wait(set(self._running), timeout=self._grace_s)
        self._leaving = True
        for task in set(self._running):
            task.cancel()
