"""What it takes to lend this node's devices to another node's coordinator."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct, field
from sollol.errors import Reason, SollolError, refuse
from sollol.report import BackendEndpoint, RpcTransport

from agent.supervisor.files import InstanceFiles
from agent.supervisor.ports import LOOPBACK

if TYPE_CHECKING:
    from agent.supervisor.cgroups import EngineCgroup
    from agent.supervisor.process import EngineProcess
    from agent.supervisor.records import Record

Secret = bytes
SUFFIX = ".backend"
_FORWARDER = ".forwarder"
# -P: a file in the working directory must never be imported instead of what is installed.
_FORWARDER_ARGV = (sys.executable, "-P", "-m", "agent.forwarder")


def backend_id(pool_id: str) -> str:
    return pool_id + SUFFIX


def forwarder_id(pool_id: str) -> str:
    """Its name in files; it is no instance of its own."""
    return pool_id + SUFFIX + _FORWARDER


class BackendWish(Struct, frozen=True, kw_only=True):
    """What to lend to whom. `bytes` are those reserved, by device; `threads` 0 is the agent's choice.

    `upload_bytes` of weights are to come; 0 when nobody said. `pool_secret` is empty where there is no tunnel: then
    `allowed_hosts` may connect, or only this node itself when it is the `coordinator_node`.
    """

    pool_id: str
    bytes: dict[str, int]
    allowed_hosts: tuple[str, ...]
    attach_within_s: float
    threads: int = 0
    upload_bytes: int = 0
    coordinator_node: str = ""
    pool_secret: Secret = b""

    @property
    def device_ids(self) -> tuple[str, ...]:
        return tuple(self.bytes)


class BackendSite(Struct, frozen=True, kw_only=True):
    """What all backends of this node have in common.

    Attributes:
        program: The ggml-rpc-server; None when there is none.
        host: Where other nodes reach this one.
        listen: The address that forwarders listen on.
        ports: The lower half for backends and tunnels, on loopback; the upper half for forwarders. No number is both:
            who tries a backend's from elsewhere finds nobody.
        tls_dir: The certificate with which bytes go through tunnels; None: they go directly.
    """

    program: Path | None
    node_id: str
    host: str
    listen: str
    ports: range
    tls_dir: Path | None = None

    @property
    def loopback_ports(self) -> range:
        return self.ports[: (len(self.ports) + 1) // 2]

    @property
    def forwarder_ports(self) -> range:
        return self.ports[(len(self.ports) + 1) // 2 :]

    @property
    def transport(self) -> RpcTransport:
        return RpcTransport.DIRECT if self.tls_dir is None else RpcTransport.TUNNEL


class BackendLaunch(Struct, frozen=True, kw_only=True):
    """Everything to start one backend, or to take up one of which an earlier agent started `running`, by role.

    `threads` are the final ones; `record` is what is written down of it.
    """

    wish: BackendWish
    site: BackendSite
    record: "Record"
    program: Path
    threads: int
    environment: Mapping[str, str]
    files: InstanceFiles
    forwarder_files: InstanceFiles
    cgroup: "EngineCgroup"
    running: "Mapping[str, EngineProcess]" = field(default_factory=dict)


def forwarder_argv(launch: BackendLaunch, port: int, *, gone_after_s: float) -> tuple[str, ...]:
    """Return the whole command line of the forwarder in front of the backend on `port`."""
    wish, site = launch.wish, launch.site
    listen, ports = LOOPBACK if _stays_here(launch) else site.listen, site.forwarder_ports
    return (
        *_FORWARDER_ARGV,
        *("--listen", f"{listen}:{ports.start}-{ports.stop - 1}"),
        *("--target", f"{LOOPBACK}:{port}"),
        *_who_may(launch),
        *("--attach-within", str(wish.attach_within_s)),
        *("--gone-after", str(gone_after_s)),
        *("--status", str(launch.forwarder_files.status)),
    )


def _stays_here(launch: BackendLaunch) -> bool:
    return launch.wish.coordinator_node == launch.site.node_id


def _who_may(launch: BackendLaunch) -> tuple[str, ...]:
    """The secret is not here: anybody can read a command line."""
    wish, site = launch.wish, launch.site
    if _stays_here(launch):
        return ("--own-user",)
    if site.tls_dir is None:
        return ("--allow", ",".join(wish.allowed_hosts))
    return ("--tls", str(site.tls_dir), "--coordinator", wish.coordinator_node, "--pool", wish.pool_id)


def endpoint_of(launch: BackendLaunch, port: int) -> BackendEndpoint:
    """Where the coordinator reaches this backend, when its forwarder listens on `port`."""
    stays = _stays_here(launch)
    return BackendEndpoint(
        node_id=launch.site.node_id,
        host=LOOPBACK if stays else launch.site.host,
        port=port,
        device_ids=launch.wish.device_ids,
        threads=launch.threads,
        tunnelled=not stays and launch.site.tls_dir is not None,
    )


def check_transport(wish: BackendWish, site: BackendSite) -> None:
    """Accept a wish that comes the way this node's bytes go; a backend for this very node's coordinator has none.

    Raises:
        SollolError: TRANSPORT_MISMATCH.
    """
    if wish.coordinator_node != site.node_id and bool(wish.pool_secret) != (site.tls_dir is not None):
        raise mismatch(site, wish.coordinator_node or "its coordinator's node")


def mismatch(site: BackendSite, other: str) -> SollolError:
    ways = ("through a tunnel", "directly")
    own, others = ways if site.tls_dir is not None else ways[::-1]
    return refuse(
        Reason.TRANSPORT_MISMATCH,
        f"node {site.node_id} carries RPC bytes {own}, {other} {others}: set rpc_transport alike on both, and give a "
        "certificate to both (`sollol join`) or to neither",
        retryable=True,
    )
