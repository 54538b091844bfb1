"""The coordinator's end of the ways to its backends: a port on loopback for each, and TLS from there.

The engine connects to those ports and knows nothing of it. Like the forwarders at the other ends it outlives its agent,
and ends by itself when its coordinator is gone.
"""

import socket
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from agent.forwarder.app import STATUS_EVERY_S, Ended
from agent.forwarder.entrance import Entrance, admit_own_user
from agent.forwarder.link import Link
from agent.forwarder.loop import Loop, Timer
from agent.forwarder.status import RefusalLog, StatusFile, log
from agent.forwarder.stream import Opening, Stream
from agent.tunnel.status import RouteStatus, TunnelStatus

# The engine opens one at a time to each backend; the next one may come before we have seen the last one end.
_MOST_LINKS = 64


class Route(NamedTuple):
    """`reach` opens a new connection to the forwarder of `node_id`."""

    node_id: str
    listener: socket.socket
    reach: Callable[[], Opening[Stream]]


class Patience(NamedTuple):
    attach_within_s: float
    gone_after_s: float


class Tunnel:
    """Takes connections of our own user's processes, from the moment `run` is called."""

    def __init__(self, routes: tuple[Route, ...], patience: Patience, status: StatusFile, loop: Loop) -> None:
        self._routes, self._patience, self._file, self._loop = routes, patience, status, loop
        self._refusals = RefusalLog()
        self._of = [RouteStatus(node_id=each.node_id, port=each.listener.getsockname()[1]) for each in routes]
        self._links: dict[Link, int] = {}
        self._ended: Ended | None = None
        self._waits: Timer | None = None

    def run(self) -> Ended:
        """Serve until nobody has come in time, all connections have ended and none comes, or `end` is called."""
        self._wait(self._patience.attach_within_s, Ended.NOBODY_ATTACHED)
        entrances = [
            Entrance(self._loop, route.listener, partial(self._came, number))
            for number, route in enumerate(self._routes)
        ]
        self._keep_counting()
        self._loop.run()
        why = self._ended or Ended.TERMINATED
        for entrance in entrances:
            entrance.close()
        for link in tuple(self._links):
            link.cut()
        self._publish(ended=why.value)
        return why

    def end(self, why: Ended) -> None:
        self._ended = self._ended or why
        self._loop.end()

    def _came(self, number: int, connection: socket.socket, peer: str) -> None:
        if len(self._links) >= _MOST_LINKS:
            connection.close()
            return
        link = Link(
            self._loop,
            peer,
            admit_own_user(connection),
            on_arrived=partial(self._arrived, number),
            on_end=self._link_ended,
        )
        self._links[link] = number

    def _arrived(self, number: int, link: Link) -> None:
        if self._waits is not None:
            self._waits.cancel()
            self._waits = None
        self._of[number] = self._of[number]._replace(connections=self._of[number].connections + 1)
        link.pump(self._routes[number].reach())

    def _link_ended(self, link: Link) -> None:
        number = self._links.pop(link)
        of = self._of[number]
        if link.refused:
            self._refusals.add(link.peer, link.refused, link.who)
        if link.failed:
            log("not_reached", node=of.node_id, why=link.failed)
        self._of[number] = of._replace(
            up_bytes=of.up_bytes + link.up_bytes,
            down_bytes=of.down_bytes + link.down_bytes,
            failed=link.failed or of.failed,
        )
        if link.failed or link.refused:
            self._publish()
        if not self._links and self._waits is None:  # who is refused changes nothing about a wait, nor ends it
            self._wait(self._patience.gone_after_s, Ended.COORDINATOR_GONE)

    def _wait(self, patience_s: float, then: Ended) -> None:
        self._waits = self._loop.later(patience_s, lambda: self.end(then))

    def _keep_counting(self) -> None:
        for link in tuple(self._links):
            link.look()
        self._publish()
        self._loop.later(STATUS_EVERY_S, self._keep_counting)

    def _publish(self, ended: str = "") -> None:
        found = list(self._of)
        for link, number in self._links.items():
            of = found[number]
            found[number] = of._replace(
                open=of.open + 1, up_bytes=of.up_bytes + link.up_bytes, down_bytes=of.down_bytes + link.down_bytes
            )
        self._file.write(TunnelStatus(routes=tuple(found), refused=self._refusals.count, ended=ended))
