"""Reads in a served coordinator's log what memory it has taken."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from sollol.report import CoordinatorPlan

from agent.supervisor.buffers import Buffers, logged_buffers
from agent.supervisor.comparison import Sizes, logged_sizes

# The sizes are in its first lines. Who logs so much before it serves is not read to the end.
_MOST_BYTES = 8 << 20
# A thread of the engine's writes its log: what was said before it served can come a moment later.
_LAGS_S = 0.5

Logged = tuple[Sizes | None, ...]
OnLogged = Callable[[CoordinatorPlan, Logged], Awaitable[None]]


async def nobody_asks(_plan: CoordinatorPlan, _logged: Logged) -> None:
    """The `OnLogged` of who has no use for it."""


async def logged_memory(log: Path, plan: CoordinatorPlan, node_id: str) -> Logged:
    """What the log says of each share of the plan; empty when it lacks a line."""
    for pause_s in (0.0, _LAGS_S):
        await asyncio.sleep(pause_s)
        found = logged_sizes(plan, await asyncio.to_thread(_buffers_in, log), node_id)
        if found:
            return found
    return ()


def _buffers_in(log: Path) -> dict[str, Buffers]:
    try:
        with log.open("rb") as file:
            text = file.read(_MOST_BYTES).decode(errors="replace")
    except OSError:  # somebody tidied up
        return {}
    return logged_buffers(text.splitlines())
