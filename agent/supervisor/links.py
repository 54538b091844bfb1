"""Sees that a coordinator has lost a backend while neither of them does anything: its side of the connection says so.

The engine itself would notice at its next request, and abort in the middle of it.
"""

import asyncio
import socket
from collections.abc import Sequence

import psutil
import structlog
from sollol.report import BackendEndpoint, CoordinatorPlan

log = structlog.get_logger(__name__)

_RESOLVE_WITHIN_S = 5.0


class BackendLinks:
    """The connections of one served coordinator to the backends that hold layers of its model."""

    def __init__(self, pid: int, addresses: Sequence[tuple[BackendEndpoint, str]]) -> None:
        self._pid = pid
        self._addresses = addresses
        self._missed: BackendEndpoint | None = None

    def lost(self) -> BackendEndpoint | None:
        """Return a backend that is lost for sure. One without any connection counts when seen so twice."""
        try:
            found = psutil.Process(self._pid).net_connections("tcp4")
        except psutil.Error:  # it has ended: whoever waits for it will say so
            return None
        states = {tuple(each.raddr): each.status for each in found if each.raddr}
        missed = None
        for endpoint, address in self._addresses:
            state = states.get((address, endpoint.port))
            if state == psutil.CONN_CLOSE_WAIT or (state is None and self._missed is endpoint):
                return endpoint
            missed = missed or (endpoint if state is None else None)
        self._missed = missed
        return None


async def backend_links(pid: int, plan: CoordinatorPlan) -> BackendLinks:
    """Look up where the plan's backends are. One whose name is not known any more is not watched."""
    holding = {share.node_id for share in plan.shares if share.layers}
    watched = [endpoint for endpoint in plan.backends if endpoint.node_id in holding]
    addresses = await asyncio.gather(*(_address(endpoint.host) for endpoint in watched))
    return BackendLinks(
        pid, [(endpoint, address) for endpoint, address in zip(watched, addresses, strict=True) if address]
    )


async def _address(host: str) -> str:
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_RESOLVE_WITHIN_S):
            found = await loop.getaddrinfo(host, None, family=socket.AF_INET, type=socket.SOCK_STREAM)
    except (OSError, TimeoutError) as error:
        log.warning("backend_not_watched", host=host, error=str(error))
        return ""
    return str(found[0][4][0])
