"""The forwarder: who may connect to the backend, one at a time, and when there is nobody left to wait for.

A backend serves one client, and makes a second one wait in its queue without a word; so a second one never gets that
far. It outlives its agent: a restart of the agent cuts no pool.
"""

import asyncio
import errno
import socket
from collections.abc import Iterable
from enum import StrEnum
from typing import Any, NamedTuple

from agent.forwarder.link import Link
from agent.forwarder.status import Status, StatusFile, log

# A coordinator that loads closes its connection and opens the next one at once, about a dozen times. The next one can
# be seen before the end of the last one is, by as much as one lost packet takes to come again.
HANDOVER_S = 0.3
_STATUS_EVERY_S = 0.5
_BACKLOG = 16
_LOGGED_REFUSALS = 100


class Ended(StrEnum):
    """Why a forwarder ended."""

    NOBODY_ATTACHED = "nobody_attached"
    COORDINATOR_GONE = "coordinator_gone"
    TERMINATED = "terminated"


class Rules(NamedTuple):
    target: tuple[str, int]
    allowed: frozenset[str]
    attach_within_s: float
    gone_after_s: float


class Forwarder:
    """Listens from the moment `run` is called."""

    def __init__(self, rules: Rules, listener: socket.socket, status: StatusFile) -> None:
        self._rules, self._listener, self._file = rules, listener, status
        self._status = Status(port=listener.getsockname()[1])
        self._attached: Link | None = None
        self._waiting: Link | None = None
        self._handover: asyncio.TimerHandle | None = None
        self._links: set[Link] = set()
        self._done: asyncio.Future[Ended] | None = None
        self._patience: asyncio.TimerHandle | None = None

    async def run(self) -> Ended:
        """Serve until nobody has come in time, the one that had come is gone, or `end` is called."""
        loop = asyncio.get_running_loop()
        self._done = loop.create_future()
        self._wait(self._rules.attach_within_s, Ended.NOBODY_ATTACHED)
        server = await loop.create_server(self._new_client, sock=self._listener, backlog=_BACKLOG)
        counting = asyncio.create_task(self._keep_counting(), name="status")
        self._file.write(self._status)
        why = await self._done
        server.close()
        counting.cancel()
        for link in tuple(self._links):
            link.cut()
        await asyncio.sleep(0)  # the sockets close in the loop's next turn
        self._tell(ended=why.value, attached=False)
        return why

    def end(self, why: Ended) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(why)

    def _new_client(self) -> asyncio.BaseProtocol:
        return Link(on_arrived=self._arrived, on_end=self._ended).client

    def _arrived(self, link: Link) -> None:
        self._links.add(link)
        if link.peer not in self._rules.allowed:
            self._refuse(link, "stranger")
        elif self._attached is None:
            self._attach(link)
        elif self._waiting is not None:
            self._refuse(link, "busy")
        else:
            self._waiting = link
            self._handover = asyncio.get_running_loop().call_later(HANDOVER_S, self._handover_over)

    def _handover_over(self) -> None:
        """One that has said goodbye is as good as gone: its successor waits on. One that has not stays."""
        if self._waiting is not None and not (self._attached is not None and self._attached.leaving):
            self._refuse(self._waiting, "busy")

    def _refuse(self, link: Link, why: str) -> None:
        self._tell(refused=self._status.refused + 1)
        if self._status.refused <= _LOGGED_REFUSALS:
            log("refused", peer=link.peer, why=why)
        link.refuse()

    def _attach(self, link: Link) -> None:
        if self._patience is not None:
            self._patience.cancel()
        self._attached = link
        self._tell(attached=True, peer=link.peer, connections=self._status.connections + 1)
        link.pump(self._rules.target)

    def _ended(self, link: Link) -> None:
        self._links.discard(link)
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
        if link is not None and not link.refused:
            self._attach(link)
        else:
            self._wait(self._rules.gone_after_s, Ended.COORDINATOR_GONE)

    def _wait(self, patience_s: float, then: Ended) -> None:
        self._patience = asyncio.get_running_loop().call_later(patience_s, self.end, then)

    async def _keep_counting(self) -> None:
        while True:
            await asyncio.sleep(_STATUS_EVERY_S)
            self._publish()

    def _tell(self, **changes: Any) -> None:
        self._status = self._status._replace(**changes)
        self._publish()

    def _publish(self) -> None:
        up, down = self._status.up_bytes, self._status.down_bytes
        if (link := self._attached) is not None:
            up, down = up + link.up_bytes, down + link.down_bytes
        self._file.write(self._status._replace(up_bytes=up, down_bytes=down))


def listen_on_first_free(host: str, ports: Iterable[int]) -> socket.socket | None:
    """Return a listening socket, None when every port is taken.

    Raises:
        OSError: `host` is not an address of this machine.
    """
    for port in ports:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(_BACKLOG)  # also taken: a port that somebody listens on and lets others bind
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            listener.setblocking(False)
            return listener
    return None


def addresses_of(hosts: Iterable[str]) -> frozenset[str]:
    """Return the IPv4 addresses of hosts (the engine knows no others); a name that nobody knows has none."""
    found: set[str] = set()
    for host in hosts:
        try:
            answers = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
        except OSError as error:
            log("unknown_host", host=host, error=str(error))
            continue
        found.update(str(answer[4][0]) for answer in answers)
    return frozenset(found)
