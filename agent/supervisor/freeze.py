"""Notices a process that is there and does nothing: its partner would hang for ever, with a health that looks fine.

Silence alone says nothing: half of what a backend is told has no answer (tensors written, graphs computed), so an idle
one looks like one that owes something. One that sleeps and lets bytes lie unread does not.
"""

from pathlib import Path
from typing import NamedTuple

UNREAD_FOR_S = 3.5
_STOPPED, _SLEEPS = "T", "S"  # a debugger's stop is another state
_ESTABLISHED, _CLOSE_WAIT = "01", "08"


class Look(NamedTuple):
    """One process at one moment: its state as ps shows it, CPU time so far, and whether input waits for it."""

    state: str
    cpu_ticks: int
    unread: bool


class FreezeWatch:
    """Told by `sees` how a process is, about once a second. Pure.

    Args:
        computes_here: Its work is CPU work. One that waits for a GPU sleeps while its input waits, and is well.
    """

    def __init__(self, *, computes_here: bool) -> None:
        self._computes_here = computes_here
        self._stopped_before = False
        self._cpu_ticks = -1
        self._idle_since_s = 0.0

    def sees(self, look: Look | None, now_s: float) -> str:
        """Return what is wrong with it; empty when nothing is known to be. None: it is gone."""
        if look is None:
            return ""
        stopped, stopped_before = look.state == _STOPPED, self._stopped_before
        self._stopped_before = stopped
        if stopped and stopped_before:
            return "was stopped by a signal and does not go on"
        if not self._computes_here or look.cpu_ticks != self._cpu_ticks or look.state != _SLEEPS or not look.unread:
            self._cpu_ticks, self._idle_since_s = look.cpu_ticks, now_s
        elif now_s - self._idle_since_s >= UNREAD_FOR_S:
            return f"has let its input lie for {now_s - self._idle_since_s:.0f} s"
        return ""


def look_at(pid: int, port: int = 0) -> Look | None:
    """Return how a process is, with the input of its connections to `port`; None when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        unread = bool(port) and _has_unread(Path(f"/proc/{pid}/net/tcp").read_text(), port)
    except OSError:
        return None
    return Look(state=fields[0], cpu_ticks=int(fields[11]) + int(fields[12]), unread=unread)


def _has_unread(table: str, port: int) -> bool:
    """Whether the kernel's table of connections has one to local `port` with input that nobody has read."""
    ours = f":{port:04X}"
    for line in table.splitlines()[1:]:
        _, local, _, state, queues = line.split(maxsplit=5)[:5]
        if local.endswith(ours) and state in (_ESTABLISHED, _CLOSE_WAIT) and int(queues.partition(":")[2], 16) > 0:
            return True
    return False
