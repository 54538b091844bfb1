"""Connections that never block: open them, read and write what is possible now, end one's own side."""

import errno
import os
import socket
import struct
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol, TypeVar

from agent.forwarder.loop import READ, WRITE

T = TypeVar("T")
BLOCKED = -1  # nothing can be read, or written, now
_KEEPALIVE_IDLE_S, _KEEPALIVE_EVERY_S, _KEEPALIVE_PROBES = 3, 2, 2
_UNACKNOWLEDGED_MS = 8000
_UNANSWERED_PROBES = 3
# The beginning of Linux's struct tcp_info: `retransmits`, `probes` that are not answered yet, ms since the last ACK.
_TCP_INFO = struct.Struct("=2xBB52xI")


class Wait(NamedTuple):
    """What an opening cannot go on without."""

    connection: socket.socket
    events: int


# Yields what it waits for, returns the result; raises OSError or RefusedError.
Opening = Generator[Wait, None, T]


class Stream(Protocol):
    """Raises OSError from any method when the connection is broken."""

    connection: socket.socket

    def recv_into(self, view: memoryview) -> int:
        """Return how much was read, 0 at the peer's end, or BLOCKED."""

    def send(self, view: memoryview) -> int:
        """Return how much was taken, or BLOCKED."""

    def close(self) -> None: ...

    def end(self) -> None:
        """Tell the peer that nothing more will come; it may go on speaking."""

    def holds(self) -> bool:
        """Whether there is something to read of which the kernel does not know any more."""


class Plain:
    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def recv_into(self, view: memoryview) -> int:
        try:
            return self.connection.recv_into(view)
        except BlockingIOError:
            return BLOCKED

    def send(self, view: memoryview) -> int:
        try:
            return self.connection.send(view)
        except BlockingIOError:
            return BLOCKED

    def close(self) -> None:
        self.connection.close()

    def end(self) -> None:
        self.connection.shutdown(socket.SHUT_WR)

    def holds(self) -> bool:
        return False


@contextmanager
def closed_unless_open(connection: socket.socket | Stream) -> Iterator[None]:
    """Close it when an opening fails, or is given up."""
    try:
        yield
    except BaseException:
        connection.close()
        raise


def connect(address: tuple[str, int]) -> Opening[Stream]:
    connection = socket.socket()
    connection.setblocking(False)
    with closed_unless_open(connection):
        notice_a_vanished_peer(connection)
        error = connection.connect_ex(address)
        if error == errno.EINPROGRESS:
            yield Wait(connection, WRITE)
            error = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, f"{os.strerror(error)}: {address[0]}:{address[1]}")
    return Plain(connection)


def read_exactly(stream: Stream, count: int) -> Opening[bytes]:
    """Never reads more: what follows belongs to somebody else. A peer that ends earlier is a broken connection."""
    buffer = memoryview(bytearray(count))
    got = 0
    while got < count:
        size = stream.recv_into(buffer[got:])
        if size == BLOCKED:
            yield Wait(stream.connection, READ)
        elif size:
            got += size
        else:
            raise ConnectionResetError(errno.ECONNRESET, "it ended before it said who it is")
    return bytes(buffer)


def write_all(stream: Stream, data: bytes) -> Opening[None]:
    left = memoryview(data)
    while left:
        size = stream.send(left)
        if size == BLOCKED:
            yield Wait(stream.connection, WRITE)
        else:
            left = left[size:]


def notice_a_vanished_peer(connection: socket.socket) -> None:
    """See within 8 s that the other machine is gone while we wait for it to speak; `has_vanished` looks at the rest."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_EVERY_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)


def has_vanished(connection: socket.socket) -> bool:
    """Whether the other machine has answered nothing for 8 s, though what we sent was sent again and again.

    TCP_USER_TIMEOUT is no such limit: it also ends the connection to a peer that is there and does not read. That one's
    window is closed, and it answers each of the kernel's probes, which become rare.
    """
    retransmits, probes, last_ack_ms = _TCP_INFO.unpack(
        connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    )
    return last_ack_ms >= _UNACKNOWLEDGED_MS and bool(retransmits or probes >= _UNANSWERED_PROBES)
