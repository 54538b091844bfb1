"""`python -P -m agent.tunnel`: carries a coordinator's connections to its backends. `app.Tunnel` says what it does."""

import argparse
import signal
import socket
import sys
from pathlib import Path

from sollol.tls import TlsFiles

from agent.forwarder import tls
from agent.forwarder.app import Ended
from agent.forwarder.entrance import addresses_of, listen_on_first_free
from agent.forwarder.loop import Loop
from agent.forwarder.status import NO_FREE_PORT, NO_TLS_FILES, StatusFile, log
from agent.forwarder.stream import Opening, Stream
from agent.tunnel.app import Patience, Route, Tunnel

_LOOPBACK = "127.0.0.1"


class Address:
    """A backend's forwarder. Its name is looked up once, and again as long as nobody knows it."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._found = addresses_of([host])

    def get(self) -> tuple[str, int]:
        """Raises OSError: the name is not known."""
        self._found = self._found or addresses_of([self._host])
        if not self._found:
            raise OSError(f"nobody knows the host {self._host}")
        return min(self._found), self._port


def main() -> int:
    given = _parser().parse_args()
    credentials = tls.credentials(given.tls, given.pool)
    if credentials is None:
        return NO_TLS_FILES
    routes = []
    for text in given.route:
        port, at, node_id = text.split("=", 2)
        listener = listen_on_first_free(_LOOPBACK, [int(port)])
        if listener is None:
            log("no_free_port", host=_LOOPBACK, ports=port)
            return NO_FREE_PORT
        routes.append(_route(listener, at, node_id, *credentials))
    loop = Loop()
    tls.follow(credentials[0], loop)
    patience = Patience(attach_within_s=given.attach_within, gone_after_s=given.gone_after)
    tunnel = Tunnel(tuple(routes), patience, StatusFile(given.status), loop)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.on_signal(number, lambda: tunnel.end(Ended.TERMINATED))
    log("ended", why=tunnel.run())
    return 0


def _route(listener: socket.socket, at: str, node_id: str, files: TlsFiles, pool: tls.Pool) -> Route:
    host, _, port = at.rpartition(":")
    address = Address(host, int(port))

    def reach() -> Opening[Stream]:
        return (yield from tls.reach(address.get(), files, pool, node_id))

    return Route(node_id, listener, reach)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="agent.tunnel", allow_abbrev=False)
    route = "a port on loopback, the forwarder it leads to, and the node that this must be"
    parser.add_argument("--route", required=True, action="append", metavar="PORT=HOST:PORT=NODE", help=route)
    parser.add_argument("--tls", required=True, type=Path, metavar="DIR", help="our certificate")
    parser.add_argument("--pool", required=True, metavar="ID", help="its secret comes on standard input")
    parser.add_argument("--attach-within", required=True, type=float, metavar="S", help="end when nobody came by then")
    parser.add_argument("--gone-after", required=True, type=float, metavar="S", help="end so long after the last left")
    parser.add_argument("--status", required=True, type=Path, metavar="FILE", help="kept up to date for the agent")
    return parser


if __name__ == "__main__":
    sys.exit(main())
