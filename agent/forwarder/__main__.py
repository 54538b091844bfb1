"""`python -P -m agent.forwarder`: stands between the cluster and one backend. `app.Forwarder` says what it does."""

import sys

# Before asyncio, which would load OpenSSL: a third of this process's memory, for nothing as long as it speaks plainly.
sys.modules["ssl"] = None  # type: ignore[assignment]

import argparse  # noqa: E402
import asyncio  # noqa: E402
import signal  # noqa: E402
from pathlib import Path  # noqa: E402

from agent.forwarder.app import Ended, Forwarder, Rules, addresses_of, listen_on_first_free  # noqa: E402
from agent.forwarder.status import NO_ADDRESS, NO_FREE_PORT, StatusFile, log  # noqa: E402


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
    target_host, _, target_port = given.target.rpartition(":")
    rules = Rules(
        target=(target_host, int(target_port)),
        allowed=addresses_of(given.allow.split(",")),
        attach_within_s=given.attach_within,
        gone_after_s=given.gone_after,
    )
    ended = asyncio.run(_run(Forwarder(rules, listener, StatusFile(given.status))))
    log("ended", why=ended)
    return 0


async def _run(forwarder: Forwarder) -> Ended:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, forwarder.end, Ended.TERMINATED)
    return await forwarder.run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="agent.forwarder", allow_abbrev=False)
    parser.add_argument("--listen", required=True, metavar="HOST:PORT[-LAST]", help="the first free port is taken")
    parser.add_argument("--target", required=True, metavar="HOST:PORT", help="the backend")
    parser.add_argument("--allow", required=True, metavar="HOST[,HOST]", help="who may connect")
    parser.add_argument("--attach-within", required=True, type=float, metavar="S", help="end when nobody came by then")
    parser.add_argument("--gone-after", required=True, type=float, metavar="S", help="end so long after the last left")
    parser.add_argument("--status", required=True, type=Path, metavar="FILE", help="kept up to date for the agent")
    return parser


if __name__ == "__main__":
    sys.exit(main())
