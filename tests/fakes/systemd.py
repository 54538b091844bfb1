"""The socket that systemd listens on, for daemons in this process."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from sollol.notices import Notices


class Systemd:
    def __init__(self, listening: socket.socket, *, watchdog_s: float) -> None:
        self._listening = listening
        self.notices = Notices(str(listening.getsockname()), watchdog_s)

    def heard(self) -> list[str]:
        """What came since the last call, in order."""
        heard = []
        while True:
            try:
                heard.append(self._listening.recv(4096).decode())
            except BlockingIOError:
                return heard


@contextmanager
def listening_systemd(path: str, *, watchdog_s: float = 0.0) -> Iterator[Systemd]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(path)
        listening.setblocking(False)
        yield Systemd(listening, watchdog_s=watchdog_s)
