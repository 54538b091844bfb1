"""Where a forwarder listens, and who may come as far as the address and the user they come from can say."""

import errno
import os
import socket
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from agent.forwarder.loop import READ, Loop
from agent.forwarder.refused import OTHER_USER, STRANGER, RefusedError
from agent.forwarder.status import log
from agent.forwarder.stream import Opening, Plain, Stream, notice_a_vanished_peer

BACKLOG = 16
_TCP_TABLE = Path("/proc/self/net/tcp")


class Entrance:
    """Calls `on_accepted` with each connection and the address it comes from, from the moment it is made."""

    def __init__(self, loop: Loop, listener: socket.socket, on_accepted: Callable[[socket.socket, str], None]) -> None:
        self._loop, self._listener, self._on_accepted = loop, listener, on_accepted
        loop.watch(listener.fileno(), READ, self._accept)

    def close(self) -> None:
        self._loop.forget(self._listener.fileno())
        self._listener.close()

    def _accept(self) -> None:
        try:
            connection, (host, _) = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # it hung up, or we have no descriptor left just now
            log("not_accepted", error=str(error))
            return
        connection.setblocking(False)
        try:
            notice_a_vanished_peer(connection)
        except OSError:
            connection.close()
            return
        self._on_accepted(connection, host)


def admit_from(connection: socket.socket, peer: str, allowed: frozenset[str]) -> Opening[Stream]:
    """Open the side of one who comes from an allowed address."""
    yield from ()
    if peer not in allowed:
        connection.close()
        raise RefusedError(STRANGER)
    return Plain(connection)


def admit_own_user(connection: socket.socket) -> Opening[Stream]:
    """Open the side of one on this machine whose end of the connection belongs to the user that we are."""
    yield from ()
    owner = owner_of_peer(connection)
    if owner != os.geteuid():
        connection.close()
        raise RefusedError(OTHER_USER, "" if owner is None else f"user {owner}")
    return Plain(connection)


def owner_of_peer(connection: socket.socket) -> int | None:
    """The user whose socket is the other end of a connection over loopback; None: it has gone, or is elsewhere."""
    try:
        theirs, ours = _in_table(connection.getpeername()), _in_table(connection.getsockname())
    except OSError:
        return None
    for line in _TCP_TABLE.read_text().splitlines()[1:]:
        _, local, remote, _, _, _, _, user, _ = line.split(maxsplit=8)
        if local == theirs and remote == ours:
            return int(user)
    return None


def _in_table(address: tuple[str, int]) -> str:
    host, port = address
    return f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{port:04X}"


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
            listener.listen(BACKLOG)  # also taken: a port that somebody listens on and lets others bind
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
