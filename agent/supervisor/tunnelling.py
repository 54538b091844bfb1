"""How a coordinator reaches backends on other nodes: through a tunnel of its own, and ports on loopback.

The engine is told those ports, and so is everything that reads its log or looks at its connections.
"""

import asyncio
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace
from sollol.errors import Reason, Refusal, Retry, refuse
from sollol.report import BackendEndpoint, CoordinatorPlan

from agent.forwarder.status import NO_FREE_PORT, NO_TLS_FILES
from agent.supervisor.failure import ended, no_tunnel
from agent.supervisor.files import InstanceFiles, last_lines
from agent.supervisor.freeze import FreezeWatch, look_at
from agent.supervisor.lending import BackendSite, mismatch
from agent.supervisor.ports import LOOPBACK, Ports
from agent.tunnel.status import read_tunnel_status

_TUNNEL = ".tunnel"
_TUNNEL_ARGV = (sys.executable, "-P", "-m", "agent.tunnel")
_ATTACH_WITHIN_S = 60.0


def tunnel_id(pool_id: str) -> str:
    """Its name in files; it is no instance of its own."""
    return pool_id + _TUNNEL


class Route(Struct, frozen=True, kw_only=True):
    """A port on loopback, and the backend's forwarder that it leads to."""

    port: int
    to: BackendEndpoint


class TunnelLaunch(Struct, frozen=True, kw_only=True):
    """Everything to start one tunnel; the secret goes through its standard input.

    Of one that an earlier agent started only the files are of interest.
    """

    pool_id: str
    routes: tuple[Route, ...]
    tls_dir: Path | None
    environment: Mapping[str, str]
    files: InstanceFiles
    secret: bytes


class Tunnels:
    """Owner of the ports that tunnels listen on."""

    def __init__(self, site: BackendSite, ports: Ports) -> None:
        self._site, self._ports = site, ports
        self._taken: dict[str, tuple[int, ...]] = {}

    def through(self, pool_id: str, plan: CoordinatorPlan) -> tuple[CoordinatorPlan, tuple[Route, ...]]:
        """Return the plan as the engine shall see it, without the secret, and the routes of its tunnel.

        The routes' ports are nobody else's until `give_back`.

        Raises:
            SollolError: TRANSPORT_MISMATCH, PORT_TAKEN.
        """
        for backend in plan.backends:
            if backend.node_id not in ("", self._site.node_id) and backend.tunnelled != (
                self._site.tls_dir is not None
            ):
                raise mismatch(self._site, backend.node_id)
        routes = self._claimed(pool_id, [backend for backend in plan.backends if backend.tunnelled])
        here = {(route.to.host, route.to.port): route.port for route in routes}
        backends = tuple(_seen_from_here(backend, here.get((backend.host, backend.port))) for backend in plan.backends)
        return replace(plan, backends=backends, pool_secret=b""), routes

    def _claimed(self, pool_id: str, backends: Iterable[BackendEndpoint]) -> tuple[Route, ...]:
        routes: list[Route] = []
        for backend in backends:
            port = self._ports.claim()
            if port is None:
                for route in routes:
                    self._ports.give_back(route.port)
                first, last = self._ports.range.start, self._ports.range.stop - 1
                message = f"ports {first} to {last} are all taken on loopback; set rpc_ports to others"
                raise refuse(Reason.PORT_TAKEN, message, retryable=True)
            routes.append(Route(port=port, to=backend))
        self._taken[pool_id] = tuple(route.port for route in routes)
        return tuple(routes)

    def hold(self, pool_id: str, plan: CoordinatorPlan) -> tuple[Route, ...]:
        """Claim the ports of a tunnel that runs already, of a plan that `through` returned."""
        routes = tuple(Route(port=backend.port, to=backend) for backend in plan.backends if backend.tunnelled)
        for route in routes:
            self._ports.hold(route.port)
        self._taken[pool_id] = tuple(route.port for route in routes)
        return routes

    def give_back(self, pool_id: str) -> None:
        """The tunnel is gone, or never was."""
        for port in self._taken.pop(pool_id, ()):
            self._ports.give_back(port)


def _seen_from_here(backend: BackendEndpoint, port: int | None) -> BackendEndpoint:
    return backend if port is None else replace(backend, host=LOOPBACK, port=port)


def tunnel_argv(launch: TunnelLaunch, *, gone_after_s: float) -> tuple[str, ...]:
    routes = (f"{route.port}={route.to.host}:{route.to.port}={route.to.node_id}" for route in launch.routes)
    return (
        *_TUNNEL_ARGV,
        *(word for route in routes for word in ("--route", route)),
        *("--tls", str(launch.tls_dir)),
        *("--pool", launch.pool_id),
        *("--attach-within", str(_ATTACH_WITHIN_S)),
        *("--gone-after", str(gone_after_s)),
        *("--status", str(launch.files.status)),
    )


class TunnelWatch:
    """Sees that a tunnel is gone or frozen (looks `every_s` apart), and which of its ways broke."""

    def __init__(self, pid: int, exited: asyncio.Task[int | None], launch: TunnelLaunch, *, every_s: float) -> None:
        self.exited = exited
        self._pid, self._launch = pid, launch
        self._freeze = FreezeWatch(computes_here=False)
        self._every_s, self._next_s = every_s, 0.0

    def listens(self) -> bool:
        return read_tunnel_status(self._launch.files.status) is not None

    def not_started(self, model: str) -> Refusal:
        """Say why it ended, or does not listen, before anybody could connect."""
        exit_code = self.exited.result() if self.exited.done() else None
        lines = last_lines(self._launch.files.log, 1)
        if exit_code == NO_FREE_PORT:
            ports = ", ".join(str(route.port) for route in self._launch.routes)
            message = f"a port for the tunnel of {model} ({ports}) has just been taken on loopback; ask again"
            return Refusal(reason=Reason.PORT_TAKEN, message=message, retry=Retry.RETRYABLE, log_lines=lines)
        if exit_code == NO_TLS_FILES:
            message = f"the tunnel of {model} cannot use the certificate in {self._launch.tls_dir}: {' '.join(lines)}"
            return Refusal(reason=Reason.CERTIFICATE_UNREADABLE, message=message, retry=Retry.RETRYABLE)
        return no_tunnel(model, self.dead() or "has a tunnel that does not listen in time", lines)

    def dead(self) -> str:
        """That it ended, and how when that is known already; empty while it runs."""
        if self.exited.done():
            return f"lost the tunnel to its backends ({ended(self.exited.result())})"
        look = look_at(self._pid)
        return "" if look is not None and not look.ending else "lost the tunnel to its backends"

    def frozen(self) -> str:
        now_s = asyncio.get_running_loop().time()
        if now_s < self._next_s:
            return ""
        self._next_s = now_s + self._every_s
        stopped = self._freeze.sees(look_at(self._pid), now_s)
        return stopped and f"has a tunnel that {stopped}"

    def broken(self, backends: Iterable[BackendEndpoint]) -> tuple[BackendEndpoint, ...]:
        """Those of `backends` to which a way broke, or could not be opened."""
        status = read_tunnel_status(self._launch.files.status)
        failed = {route.port for route in status.routes if route.failed} if status else set()
        return tuple(backend for backend in backends if backend.tunnelled and backend.port in failed)
