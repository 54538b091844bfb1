"""Waits for the address to listen on: after power-on a service may be there before its network (Wi-Fi, DHCP) is."""

import asyncio
import errno
import socket
from collections.abc import Awaitable, Callable

import structlog

from sollol.errors import Reason, refuse
from sollol.lifecycle import Stop

log = structlog.get_logger(__name__)

# Longer than systemd's limit on starts counts: it tries again for ever, instead of giving up within seconds.
HERE_WITHIN_S = 60.0
_POLL_S = 0.5


async def serve_there(
    listen: str, stop: Stop, serve: Callable[[], Awaitable[None]], *, within_s: float = HERE_WITHIN_S
) -> None:
    """Run `serve` once an interface of this machine has the address `listen`; not at all when `stop` comes first.

    Raises:
        SollolError: PORT_TAKEN, when none has it in time.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + within_s
    told = False
    while not stop.requested:
        problem = await _problem(listen)
        if not problem:
            return await serve()
        if loop.time() > until:
            message = f"cannot listen on {listen}: {problem}. Set listen to an address of this machine, or bring it up"
            raise refuse(Reason.PORT_TAKEN, message)
        if not told:
            log.warning("address_awaited", listen=listen, problem=problem, within_s=within_s)
            told = True
        await asyncio.wait([waiting := asyncio.ensure_future(stop.wait())], timeout=_POLL_S)
        waiting.cancel()
    return None


async def _problem(listen: str) -> str:
    """Why nothing can be bound there, as far as that may change; empty when it can be, or will never be."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(listen, 0, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        return f"it names no address ({error.strerror})"
    except OSError as error:
        return str(error)
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                return "no interface of this machine has that address"
    return ""
