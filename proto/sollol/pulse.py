"""The event loop's pulse: a task of the loop shows systemd that it turns, and logs how late it was when it did not."""

import asyncio
from typing import Protocol

import structlog

from sollol.notices import Notices

log = structlog.get_logger(__name__)

BEAT_S = 2.0
LATE_S = 1.0  # worth a line
SICK_S = 5.0  # one turn of the loop that takes so long is no sign of life
DRAIN_S = 10.0  # from one beat to the next, with room: a loop that is stuck while it stops gets no more


class Stopping(Protocol):
    @property
    def requested(self) -> bool: ...

    def status(self) -> str: ...


async def pulse(stop: Stopping, notices: Notices, *, beat_s: float = BEAT_S) -> None:
    """Beat until cancelled. A loop that is stuck feeds no watchdog, nor does one whose every turn takes very long."""
    clock = asyncio.get_running_loop().time
    beat_s = min(beat_s, notices.watchdog_s / 4 or beat_s)
    while True:
        due_s = clock() + beat_s
        await asyncio.sleep(beat_s)
        late_s = clock() - due_s
        if late_s > LATE_S:
            log.warning("event_loop_late", late_s=round(late_s, 1))
        if late_s < SICK_S:
            notices.alive()
        if stop.requested:
            notices.extend(DRAIN_S)
        notices.status(stop.status())
