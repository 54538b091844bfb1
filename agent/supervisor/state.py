"""The life of one supervised engine, as a table. Pure: its `owner` acts on it.

A process exists exactly in the live states: only START enters them and only EXITED leaves them, so no
path through the code can forget a child. STOP changes nothing about a dead one: its record still says why it died.
"""

from enum import StrEnum

from sollol.report import InstanceState

STOPPED = InstanceState.STOPPED
STARTING = InstanceState.STARTING
READY = InstanceState.READY
STOPPING = InstanceState.STOPPING
BACKOFF = InstanceState.BACKOFF
FAILED = InstanceState.FAILED
LOST = InstanceState.LOST


class Event(StrEnum):
    START = "START"
    HEALTHY = "HEALTHY"  # the engine says it serves
    UNHEALTHY = "UNHEALTHY"  # it serves nobody any more, or never will: what is left of it must go
    STOP = "STOP"  # somebody asked
    EXITED = "EXITED"  # the process is gone, whatever the reason
    BACK_OFF = "BACK_OFF"  # the model died too often here: starts of it are refused for a while
    RETRY_DUE = "RETRY_DUE"  # that while is over


LIVE = frozenset({STARTING, READY, STOPPING, LOST})
SETTLED = frozenset({READY, FAILED, STOPPED, BACKOFF})  # nothing changes by itself but for a death or the end of a wait

_TABLE: dict[tuple[InstanceState, Event], InstanceState] = {
    (STOPPED, Event.START): STARTING,
    (STARTING, Event.HEALTHY): READY,
    (STARTING, Event.UNHEALTHY): LOST,
    (STARTING, Event.STOP): STOPPING,
    (STARTING, Event.EXITED): FAILED,
    (READY, Event.UNHEALTHY): LOST,
    (READY, Event.STOP): STOPPING,
    (READY, Event.EXITED): FAILED,
    (LOST, Event.STOP): STOPPING,
    (LOST, Event.EXITED): FAILED,
    (STOPPING, Event.EXITED): STOPPED,
    (FAILED, Event.BACK_OFF): BACKOFF,
    (BACKOFF, Event.RETRY_DUE): FAILED,
}


def after(state: InstanceState, event: Event) -> InstanceState:
    """Return the state that follows; an event that a state does not know leaves it as it is."""
    return _TABLE.get((state, event), state)
