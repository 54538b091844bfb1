"""What it takes to lend this node's devices to another node's coordinator."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct, field

from agent.supervisor.files import InstanceFiles
from agent.supervisor.ports import LOOPBACK

if TYPE_CHECKING:
    from agent.supervisor.process import EngineProcess
    from agent.supervisor.records import Record

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

    `upload_bytes` of weights are to come; 0 when nobody said.
    """

    pool_id: str
    bytes: dict[str, int]
    allowed_hosts: tuple[str, ...]
    attach_within_s: float
    threads: int = 0
    upload_bytes: int = 0

    @property
    def device_ids(self) -> tuple[str, ...]:
        return tuple(self.bytes)


class BackendSite(Struct, frozen=True, kw_only=True):
    """What all backends of this node have in common.

    Attributes:
        program: The ggml-rpc-server; None when there is none.
        host: Where other nodes reach this one.
        listen: The address that forwarders listen on.
        ports: For backends, on loopback, and for their forwarders.
    """

    program: Path | None
    node_id: str
    host: str
    listen: str
    ports: range


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
    running: "Mapping[str, EngineProcess]" = field(default_factory=dict)


def forwarder_argv(launch: BackendLaunch, port: int, *, gone_after_s: float) -> tuple[str, ...]:
    """Return the whole command line of the forwarder in front of the backend on `port`."""
    wish, site = launch.wish, launch.site
    return (
        *_FORWARDER_ARGV,
        *("--listen", f"{site.listen}:{site.ports.start}-{site.ports.stop - 1}"),
        *("--target", f"{LOOPBACK}:{port}"),
        *("--allow", ",".join(wish.allowed_hosts)),
        *("--attach-within", str(wish.attach_within_s)),
        *("--gone-after", str(gone_after_s)),
        *("--status", str(launch.forwarder_files.status)),
    )
