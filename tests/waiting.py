"""Waiting in tests: for a condition, with a bound and a description. Sleeping for a guess is how suites get flaky."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
LOOK_AT_MOST_S = 0.5
"""What one look costs of the bound, however long our own process was held up meanwhile."""


async def wait_until(condition: Callable[[], T | Awaitable[T]], *, within_s: float = 5.0, what: str) -> T:
    """Return the first truthy result of `condition`; fail with `what` after `within_s` seconds."""
    waited_s, before_s = 0.0, time.monotonic()
    while True:
        overdue = waited_s > within_s  # told before the look, so that the last one comes after the bound
        result = condition()
        if inspect.isawaitable(result):
            result = await result
        if result:
            return result  # type: ignore[return-value]
        if overdue:
            raise AssertionError(f"not within {within_s} s: {what}")
        await asyncio.sleep(0.01)
        now_s = time.monotonic()
        waited_s, before_s = waited_s + min(now_s - before_s, LOOK_AT_MOST_S), now_s
