"""`python -P -m agent.forwarder`: stands between the cluster and one backend. `app.Forwarder` says what it does."""

import argparse
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from agent.forwarder.app import Ended, Forwarder, Rules
from agent.forwarder.entrance import addresses_of, admit_from, admit_own_user, listen_on_first_free
from agent.forwarder.loop import Loop
from agent.forwarder.status import NO_ADDRESS, NO_FREE_PORT, NO_TLS_FILES, StatusFile, log
from agent.forwarder.stream import Opening, Stream


def main() -> int:
    given = _parser().parse_args()
    host, _, ports = given.listen.rpartition(":")
    first, _, last = ports.partition("-")
    try:
        listener = listen_on_first_free(host, range(int(first), int(last or first) + 1))
    except OSError as error:
        log("cannot_listen", host=host, ports=ports, error=str(error))
        return NO_ADDRESS
    if listener is None:
        log("no_free_port", host=host, ports=ports)
        return NO_FREE_PORT
    loop = Loop()
    admit = _admission(given, loop)
    if admit is None:
        return NO_TLS_FILES
    target_host, _, target_port = given.target.rpartition(":")
    rules = Rules(
        target=(target_host, int(target_port)),
        admit=admit,
        attach_within_s=given.attach_within,
        gone_after_s=given.gone_after,
    )
    forwarder = Forwarder(rules, listener, StatusFile(given.status), loop)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.on_signal(number, lambda: forwarder.end(Ended.TERMINATED))
    log("ended", why=forwarder.run())
    return 0


def _admission(given: argparse.Namespace, loop: Loop) -> Callable[[socket.socket, str], Opening[Stream]] | None:
    if given.own_user:
        return lambda connection, _: admit_own_user(connection)
    if not given.tls:
        allowed = addresses_of(given.allow.split(","))
        return lambda connection, peer: admit_from(connection, peer, allowed)
    from agent.forwarder import tls  # noqa: PLC0415 - a third of this process's memory

    credentials = tls.credentials(given.tls, given.pool)
    if credentials is None:
        return None
    files, pool = credentials
    tls.follow(files, loop)
    return lambda connection, _: tls.admit(connection, files, pool, given.coordinator)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="agent.forwarder", allow_abbrev=False)
    parser.add_argument("--listen", required=True, metavar="HOST:PORT[-LAST]", help="the first free port is taken")
    parser.add_argument("--target", required=True, metavar="HOST:PORT", help="the backend")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--allow", metavar="HOST[,HOST]", help="who may connect, in plain text")
    who.add_argument("--own-user", action="store_true", help="processes of our own user on this machine may")
    who.add_argument(
        "--tls", type=Path, metavar="DIR", help="only --coordinator may, over TLS, with the secret on standard input"
    )
    parser.add_argument("--coordinator", default="", metavar="NODE")
    parser.add_argument("--pool", default="", metavar="ID")
    parser.add_argument("--attach-within", required=True, type=float, metavar="S", help="end when nobody came by then")
    parser.add_argument("--gone-after", required=True, type=float, metavar="S", help="end so long after the last left")
    parser.add_argument("--status", required=True, type=Path, metavar="FILE", help="kept up to date for the agent")
    return parser


if __name__ == "__main__":
    sys.exit(main())
