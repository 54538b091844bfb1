"""A node out of reach may only have an agent that is restarted: its engines run on, and it is back in a moment."""

import asyncio
from collections.abc import Callable, Iterable

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


async def first_back(node_ids: Iterable[str], status: Callable[[str], NodeStatus | None]) -> str | None:
    """Of nodes that went away the first that reports anew; None when they are lost, or silent for as long as that.

    One whose loss has not shown yet counts as away until its next report.
    """
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    before = {node_id: status(node_id) for node_id in sorted(node_ids)}
    while before:
        for node_id, was in tuple(before.items()):
            now = status(node_id)
            if was is None or now is None or loop.time() - began_s >= lost_after_s(now):
                del before[node_id]
            elif now.connected and now.report is not was.report:
                return node_id
            elif not now.connected and not is_away(now):
                del before[node_id]
        await asyncio.sleep(_POLL_S)
    return None
