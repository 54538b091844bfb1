"""An agent that leaves its engines to its successor: whoever hangs on to this one is sent away at once."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from sollol.errors import Reason, Refusal, Retry, SollolError

RESTARTING = Refusal(
    reason=Reason.AGENT_RESTARTING,
    message="this agent is being restarted, its engines run on: ask again",
    retry=Retry.RETRYABLE,
    retry_after_s=2.0,
)


class Departure:
    def __init__(self) -> None:
        self._begun = asyncio.Event()

    def begin(self) -> None:
        self._begun.set()

    async def unless_begun(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` to its end, or to the departure.

        Raises:
            SollolError: AGENT_RESTARTING.
        """
        if self._begun.is_set():
            work.close()
            raise SollolError(RESTARTING)
        tasks = [asyncio.create_task(work), asyncio.create_task(self._begun.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise SollolError(RESTARTING)
            tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
