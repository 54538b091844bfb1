"""Notices a process that is there and does nothing: its partner would hang for ever, with a health that looks fine.

Silence alone says nothing: half of what a backend is told has no answer (tensors written, graphs computed), so an idle
one looks like one that owes something. One that sleeps and lets bytes lie unread does not. A coordinator that says it
generates and takes no CPU time does not either, where its work is CPU work.
"""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from agent.supervisor.identity import stat_fields

IDLE_FOR_S = 2.9
_IDLE_LOOKS = 3  # we may have slept longer than it
_STOPPED, _SLEEPS = "T", "S"  # a debugger's stop is another state
RUNS, _WAITS_FOR_A_DISK = "R", "D"
_ESTABLISHED, _CLOSE_WAIT = "01", "08"
_ENDED, _PF_EXITING = "ZX", 4  # as ps shows it; linux/sched.h


class Look(NamedTuple):
    """One process at one moment: its state as ps shows it, CPU time so far, and whether work waits for it.

    `ending`: it will do nothing any more. It closes its connections before ps says that it is a zombie.
    """

    state: str
    cpu_ticks: int
    has_work: bool = False
    ending: bool = False


class FreezeWatch:
    """Told by `sees` how a process is, about once a second. Pure.

    Args:
        computes_here: Its work is CPU work. One that waits for a GPU sleeps while its input waits, and is well.
        idle: What it does that sleeps beside its work.
        slack_ticks: CPU time in which it does not get on with its work: answering us takes some.
    """

    def __init__(self, *, computes_here: bool, idle: str = "has let its input lie", slack_ticks: int = 0) -> None:
        self._computes_here, self._idle, self._slack_ticks = computes_here, idle, slack_ticks
        self._stopped_before = False
        # When it was seen, and its CPU time then: the newest looks between which it did nothing, the oldest first.
        self._looks: list[tuple[float, int]] = []

    def rests(self, look: Look) -> bool:
        """Whether it has done nothing since it was seen last: only then it matters whether there is work for it."""
        used_little = bool(self._looks) and look.cpu_ticks - self._looks[-1][1] <= self._slack_ticks
        return self._computes_here and used_little and look.state == _SLEEPS

    def sees(self, look: Look | None, now_s: float) -> str:
        """Return what is wrong with it; empty when nothing is known to be. None: it is gone."""
        if look is None:
            return ""
        stopped, stopped_before = look.state == _STOPPED, self._stopped_before
        self._stopped_before = stopped
        if stopped and stopped_before:
            return "was stopped by a signal and does not go on"
        if not (look.has_work and self.rests(look)):
            self._looks = [(now_s, look.cpu_ticks)]
            return ""
        # What it did at first must not hide for how long it has done nothing since.
        within = [seen for seen in self._looks if look.cpu_ticks - seen[1] <= self._slack_ticks]
        self._looks = [*within, (now_s, look.cpu_ticks)]
        idle_s = now_s - self._looks[0][0]
        if idle_s >= IDLE_FOR_S and len(within) >= _IDLE_LOOKS:
            return f"{self._idle} for {idle_s:.0f} s"
        return ""


def look_at(pid: int, port: int = 0) -> Look | None:
    """Return how a process is, with the input of its connections to `port`; None when it is gone."""
    try:
        fields = stat_fields(Path(f"/proc/{pid}/stat"))
        unread = bool(port) and _has_unread(Path(f"/proc/{pid}/net/tcp").read_text(), port)
    except OSError:
        return None
    ending = fields[0] in _ENDED or bool(int(fields[6]) & _PF_EXITING)
    look = Look(state=fields[0], cpu_ticks=int(fields[11]) + int(fields[12]), ending=ending)
    return with_work(look, pid) if unread else look


def with_work(look: Look, pid: int) -> Look:
    """The look at one for which work waits: its state is that of its busiest thread, not of its first one."""
    if look.state != _SLEEPS:
        return look._replace(has_work=True)
    states = set()
    with suppress(OSError):  # it, or one of its threads, has just ended
        states = {stat_fields(thread / "stat")[0] for thread in Path(f"/proc/{pid}/task").iterdir()}
    busiest = next((state for state in (RUNS, _WAITS_FOR_A_DISK) if state in states), _SLEEPS)
    return look._replace(state=busiest, has_work=True)


def _has_unread(table: str, port: int) -> bool:
    """Whether the kernel's table of connections has one to local `port` with input that nobody has read."""
    ours = f":{port:04X}"
    for line in table.splitlines()[1:]:
        _, local, _, state, queues = line.split(maxsplit=5)[:5]
        if local.endswith(ours) and state in (_ESTABLISHED, _CLOSE_WAIT) and int(queues.partition(":")[2], 16) > 0:
            return True
    return False
