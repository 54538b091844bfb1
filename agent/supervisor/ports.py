"""The ports that backends and coordinators get, each from one range; two starts at a time never get the same one."""

import socket

LOOPBACK = "127.0.0.1"


class Ports:
    """The ports of one address of this machine."""

    def __init__(self, ports: range, host: str = LOOPBACK) -> None:
        self.range, self._host = ports, host
        self._claimed: set[int] = set()

    def claim(self, besides: frozenset[int] = frozenset()) -> int | None:
        """Return the first port that nobody listens on, claimed until `give_back`; None when all are taken."""
        free = (port for port in self.range if port not in self._claimed | besides and _is_free(self._host, port))
        port = next(free, None)
        if port is not None:
            self._claimed.add(port)
        return port

    def hold(self, port: int) -> None:
        """Somebody of ours listens there already."""
        self._claimed.add(port)

    def give_back(self, port: int) -> None:
        self._claimed.discard(port)


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As servers do: a port on which only old connections linger is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return False
    return True
