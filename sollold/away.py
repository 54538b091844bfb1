"""A node out of reach may only have an agent that is restarted: its engines run on, and it is back in a moment."""

import asyncio
from collections.abc import Callable

from sollol.errors import Reason
from sollol.report import NodeStatus

# A node out of reach that has said nothing for this long is lost; an agent that is restarted is back before.
LOST_AFTER_S = 5.0
# One whose agent has said that it is being restarted: an upgrade takes its time, and its engines are well.
LOST_AFTER_RESTART_S = 15.0
# What a call ends in whose agent has gone away.
GONE = frozenset({Reason.AGENT_UNREACHABLE, Reason.AGENT_RESTARTING})
_POLL_S = 0.05


def is_away(status: NodeStatus) -> bool:
    """Whether it is out of reach and not lost yet."""
    return not status.connected and status.report_age_s < lost_after_s(status)


def lost_after_s(status: NodeStatus) -> float:
    """How long the node may be silent before it is lost."""
    return LOST_AFTER_RESTART_S if status.restarting else LOST_AFTER_S


async def is_back(status: Callable[[], NodeStatus | None]) -> bool:
    """Wait until the node reports anew; false when it is lost first, or has been silent for as long as that takes."""
    before, loop = status(), asyncio.get_running_loop()
    began_s = loop.time()
    while before is not None and (now := status()) is not None and loop.time() - began_s < lost_after_s(now):
        if now.connected and now.report is not before.report:
            return True
        await asyncio.sleep(_POLL_S)
    return False
