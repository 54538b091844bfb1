"""The forwarder: who may connect to the backend, one at a time, and when there is nobody left to wait for.

A backend serves one client, and makes a second one wait in its queue without a word; so a second one never gets that
far. It outlives its agent: a restart of the agent cuts no pool.
"""

import socket
from collections.abc import Callable
from enum import StrEnum
from typing import Any, NamedTuple

from agent.forwarder.entrance import Entrance
from agent.forwarder.link import Link
from agent.forwarder.loop import Loop, Timer
from agent.forwarder.refused import BUSY
from agent.forwarder.status import RefusalLog, Status, StatusFile
from agent.forwarder.stream import Opening, Stream, connect

# A coordinator that loads closes its connection and opens the next one at once, about a dozen times. The next one can
# be seen before the end of the last one is, by as much as one lost packet takes to come again.
HANDOVER_S = 0.3
STATUS_EVERY_S = 0.5
# When more have come and not said who they are, the one that has not for longest is cut: silence keeps nobody out.
_MOST_UNKNOWN = 16


class Ended(StrEnum):
    """Why a forwarder, or a tunnel, ended."""

    NOBODY_ATTACHED = "nobody_attached"
    COORDINATOR_GONE = "coordinator_gone"
    TERMINATED = "terminated"


class Rules(NamedTuple):
    """`admit` opens the side of whoever connects, given where they come from, or refuses."""

    target: tuple[str, int]
    admit: Callable[[socket.socket, str], Opening[Stream]]
    attach_within_s: float
    gone_after_s: float


class Forwarder:
    """Listens from the moment `run` is called."""

    def __init__(self, rules: Rules, listener: socket.socket, status: StatusFile, loop: Loop) -> None:
        self._rules, self._listener, self._file, self._loop = rules, listener, status, loop
        self._status = Status(port=listener.getsockname()[1])
        self._refusals = RefusalLog()
        self._attached: Link | None = None
        self._waiting: Link | None = None
        self._handover: Timer | None = None
        self._links: set[Link] = set()
        self._unknown: dict[Link, None] = {}  # in the order in which they came
        self._ended: Ended | None = None
        self._patience: Timer | None = None

    def run(self) -> Ended:
        """Serve until nobody has come in time, the one that had come is gone, or `end` is called."""
        self._wait(self._rules.attach_within_s, Ended.NOBODY_ATTACHED)
        entrance = Entrance(self._loop, self._listener, self._came)
        self._file.write(self._status)
        self._keep_counting()
        self._loop.run()
        why = self._ended or Ended.TERMINATED
        entrance.close()
        for link in tuple(self._links):
            link.cut()
        self._tell(ended=why.value, attached=False)
        return why

    def end(self, why: Ended) -> None:
        self._ended = self._ended or why
        self._loop.end()

    def _came(self, connection: socket.socket, peer: str) -> None:
        if len(self._unknown) >= _MOST_UNKNOWN:
            next(iter(self._unknown)).refuse(BUSY)
        admitted = self._rules.admit(connection, peer)
        link = Link(self._loop, peer, admitted, on_arrived=self._arrived, on_end=self._link_ended)
        self._links.add(link)
        self._unknown[link] = None

    def _arrived(self, link: Link) -> None:
        self._unknown.pop(link, None)
        if self._attached is None:
            self._attach(link)
        elif self._waiting is not None:
            link.refuse(BUSY)
        else:
            self._waiting = link
            self._handover = self._loop.later(HANDOVER_S, self._handover_over)

    def _handover_over(self) -> None:
        """One that has said goodbye is as good as gone: its successor waits on. One that has not stays."""
        if self._waiting is not None and not (self._attached is not None and self._attached.leaving):
            self._waiting.refuse(BUSY)

    def _refused(self, peer: str, why: str, who: str = "") -> None:
        self._refusals.add(peer, why, who)
        self._tell(refused=self._refusals.count)

    def _attach(self, link: Link) -> None:
        if self._patience is not None:
            self._patience.cancel()
        self._attached = link
        self._tell(attached=True, peer=link.peer, connections=self._status.connections + 1)
        link.pump(connect(self._rules.target))

    def _link_ended(self, link: Link) -> None:
        self._links.discard(link)
        self._unknown.pop(link, None)
        if link.refused:
            self._refused(link.peer, link.refused, link.who)
        if link is self._waiting:
            self._waiting = None
        elif link is self._attached:
            self._attached = None
            self._tell(
                attached=False,
                up_bytes=self._status.up_bytes + link.up_bytes,
                down_bytes=self._status.down_bytes + link.down_bytes,
            )
            if link.peer_vanished:  # no coordinator lives to tell of it, and makes another connection
                self.end(Ended.COORDINATOR_GONE)
            self._next()

    def _next(self) -> None:
        if self._handover is not None:
            self._handover.cancel()
        link, self._waiting = self._waiting, None
        if link is not None:
            self._attach(link)
        else:
            self._wait(self._rules.gone_after_s, Ended.COORDINATOR_GONE)

    def _wait(self, patience_s: float, then: Ended) -> None:
        self._patience = self._loop.later(patience_s, lambda: self.end(then))

    def _keep_counting(self) -> None:
        for link in tuple(self._links):
            link.look()
        self._publish()
        self._loop.later(STATUS_EVERY_S, self._keep_counting)

    def _tell(self, **changes: Any) -> None:
        self._status = self._status._replace(**changes)
        self._publish()

    def _publish(self) -> None:
        up, down = self._status.up_bytes, self._status.down_bytes
        if (link := self._attached) is not None:
            up, down = up + link.up_bytes, down + link.down_bytes
        self._file.write(self._status._replace(up_bytes=up, down_bytes=down))
