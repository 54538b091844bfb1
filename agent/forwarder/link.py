"""One coordinator's connection and the one made for it to the backend: bytes both ways, at the slower one's speed."""

import asyncio
import socket
from collections.abc import Callable
from typing import cast

CONNECT_WITHIN_S = 5.0
LEAVE_WITHIN_S = 10.0  # a backend that got the end of its input frees its buffers first, and those can be large
_KEEPALIVE_IDLE_S, _KEEPALIVE_EVERY_S, _KEEPALIVE_PROBES = 3, 2, 2
_UNACKNOWLEDGED_MS = 8000
_WRITE_HIGH_BYTES = 512 * 1024


class Side(asyncio.Protocol):
    """One of a link's two connections: what it reads, the other one writes."""

    transport: asyncio.Transport

    def __init__(self, link: "Link") -> None:
        self._link = link
        self.moved = 0
        self.open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=_WRITE_HIGH_BYTES)
        self.open = True

    def data_received(self, data: bytes) -> None:
        self.moved += len(data)
        self._link.other(self).transport.write(data)

    def pause_writing(self) -> None:
        other = self._link.other(self)
        if other.open:
            other.transport.pause_reading()

    def resume_writing(self) -> None:
        other = self._link.other(self)
        if other.open:
            other.transport.resume_reading()

    def eof_received(self) -> bool:
        self._link.half_closed(self)
        return True  # what flows the other way may still be under way

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if isinstance(exc, OSError) and not isinstance(exc, ConnectionError):  # timed out, or no route any more
            self._link.peer_vanished = True
        self._link.lost(self)


class Client(Side):
    """The coordinator's side: the first to exist, and silent until there is a backend's."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.pause_reading()
        self._link.arrived()


class Link:
    """Both sides of one connection of a coordinator.

    Args:
        on_arrived: Called when the client is connected: decides by `pump`, `refuse`, or later.
        on_end: Called once when both sides are gone.
    """

    def __init__(self, *, on_arrived: Callable[["Link"], None], on_end: Callable[["Link"], None]) -> None:
        self._on_arrived, self._on_end = on_arrived, on_end
        self.client, self._backend = Client(self), Side(self)
        self.leaving = self.refused = self.peer_vanished = False
        self.peer = ""
        self._connecting: asyncio.Task[None] | None = None
        self._cut: asyncio.TimerHandle | None = None
        self._ended = False

    @property
    def up_bytes(self) -> int:
        return self.client.moved

    @property
    def down_bytes(self) -> int:
        return self._backend.moved

    def other(self, side: Side) -> Side:
        return self._backend if side is self.client else self.client

    def arrived(self) -> None:
        self.peer = self.client.transport.get_extra_info("peername")[0]
        _notice_a_vanished_peer(self.client.transport.get_extra_info("socket"))
        self._on_arrived(self)

    def refuse(self) -> None:
        self.refused = True
        self.client.transport.abort()

    def pump(self, target: tuple[str, int]) -> None:
        """Connect to the backend, then let the bytes flow."""
        self._connecting = asyncio.create_task(self._connect(target), name="connect to the backend")

    async def _connect(self, target: tuple[str, int]) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_WITHIN_S):
                await loop.create_connection(lambda: self._backend, *target)
        except (OSError, TimeoutError):  # the agent sees for itself what became of its backend
            self.client.transport.abort()
            return
        if self.client.open:
            self.client.transport.resume_reading()
        else:
            self._backend.transport.abort()

    def half_closed(self, side: Side) -> None:
        """One side will send no more: pass on what is left, and the end. The backend's end ends both."""
        self._leave_soon()
        if side is self.client and self._backend.open:
            self._backend.transport.write_eof()
        else:
            for each in (self.client, self._backend):
                if each.open:
                    each.transport.close()

    def lost(self, side: Side) -> None:
        self._leave_soon()
        other = self.other(side)
        if side is self.client and other.open:
            other.transport.abort()
        elif other.open:
            other.transport.close()
        if not self.client.open and not self._backend.open and not self._is_connecting():
            self._finish()

    def cut(self) -> None:
        for side in (self.client, self._backend):
            if side.open:
                side.transport.abort()

    def _is_connecting(self) -> bool:
        if self._connecting is None or self._connecting.done():
            return False
        self._connecting.add_done_callback(lambda _: None if self._backend.open else self._finish())
        return True

    def _leave_soon(self) -> None:
        if not self.leaving:
            self.leaving = True
            self._cut = asyncio.get_running_loop().call_later(LEAVE_WITHIN_S, self.cut)

    def _finish(self) -> None:
        if self._cut is not None:
            self._cut.cancel()
        if not self._ended:
            self._ended = True
            self._on_end(self)


def _notice_a_vanished_peer(connection: socket.socket) -> None:
    """See within 10 s that the other machine is gone, whether we wait for it to speak or to acknowledge."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_EVERY_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MS)
