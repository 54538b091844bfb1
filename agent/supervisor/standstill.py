"""Sees that a coordinator stands still although it lives: stopped by a signal, or generating without computing.

Its health looks fine then: threads that compute nothing answer it. Whether it generates, it says itself; whether it
computes, the kernel does. Neither alone proves anything: a reader that takes nothing makes a stream stand still too.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
from sollol.report import CoordinatorPlan

from agent.supervisor.command import CPU
from agent.supervisor.freeze import RUNS, FreezeWatch, look_at, with_work
from agent.supervisor.health import ask

_SLACK_TICKS = 5  # of 10 ms: 2 % of the time that it must be idle for


class _Slot(msgspec.Struct):
    is_processing: bool = False


_SLOTS = msgspec.json.Decoder(list[_Slot])


class Standstill:
    """Looks at one coordinator.

    Args:
        streams: How many requests it has; it is asked nothing while it has none.
        every_s: The least time between two looks.
        key: What it asks of whoever asks it.
    """

    def __init__(
        self,
        pid: int,
        plan: CoordinatorPlan,
        socket: Path,
        *,
        streams: Callable[[], int],
        every_s: float,
        key: str = "",
    ) -> None:
        self._pid, self._socket, self._key, self._streams = pid, socket, key, streams
        idle = "generates and has computed nothing"
        self._watch = FreezeWatch(computes_here=_computes_here(plan), idle=idle, slack_ticks=_SLACK_TICKS)
        self._every_s, self._next_s = every_s, 0.0

    async def seen(self) -> str:
        """Return what is wrong with it; empty when nothing is known to be. Takes half a second at most."""
        now_s = asyncio.get_running_loop().time()
        look = look_at(self._pid) if now_s >= self._next_s else None
        if look is None:
            return ""
        self._next_s = now_s + self._every_s
        if self._watch.rests(look) and self._streams():
            closely = with_work(look, self._pid)  # before it is asked: it would be busy with the answer
            generates = await self._generates()
            if generates is None or closely.state == RUNS:
                return ""  # the time that it takes will tell
            look = closely if generates else look
        return self._watch.sees(look, now_s)

    async def _generates(self) -> bool | None:
        """Whether it says so; None when it does not answer: its readers may keep it busy."""
        answer = await ask(self._socket, "/slots", self._key)
        if answer is None or answer.status != 200:
            return None
        try:
            return any(slot.is_processing for slot in _SLOTS.decode(answer.body))
        except msgspec.DecodeError:
            return None


def _computes_here(plan: CoordinatorPlan) -> bool:
    """Whether all of its work is CPU work of its own: it waits for GPUs and backends, and uses no time meanwhile."""
    return not plan.backends and all(share.device_id == CPU for share in plan.shares if share.layers)
