"""A node out of reach may only have an agent that is restarted: its engines run on, and it is back in a moment."""

import asyncio
from collections.abc import Callable

from sollol.errors import Reason
from sollol.report import NodeStatus

# A node out of reach that has said nothing for this long is lost; an agent that is restarted is back before.
LOST_AFTER_S = 5.0
# What a call ends in whose agent has gone away.
GONE = frozenset({Reason.AGENT_UNREACHABLE, Reason.AGENT_RESTARTING})
_POLL_S = 0.05


def is_away(status: NodeStatus) -> bool:
    """Whether it is out of reach and not lost yet."""
    return not status.connected and status.report_age_s < LOST_AFTER_S


async def is_back(status: Callable[[], NodeStatus | None]) -> bool:
    """Wait until the node reports anew; false when it is lost first, or has been silent for as long as that takes."""
    before = status()
    try:
        async with asyncio.timeout(LOST_AFTER_S):
            while True:
                now = status()
                if now is None or before is None:
                    return False
                if now.connected and now.report is not before.report:
                    return True
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        return False
