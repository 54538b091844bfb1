"""Waiting in tests: for a condition, with a bound and a description. Sleeping for a guess is how suites get flaky."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def wait_until(condition: Callable[[], T | Awaitable[T]], *, within_s: float = 5.0, what: str) -> T:
    """Return the first truthy result of `condition`; fail with `what` after `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while True:
        result = condition()
        if inspect.isawaitable(result):
            result = await result
        if result:
            return result  # type: ignore[return-value]
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s} s: {what}")
        await asyncio.sleep(0.01)
