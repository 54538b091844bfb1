"""What is written down of each instance, so that the next agent can take it up again: a file each, whole or not there.

It holds for one boot of the machine, so it need not outlive a loss of power.
"""

from collections.abc import Iterator
from pathlib import Path

import structlog
from msgspec import Struct, field
from sollol import kept
from sollol.report import CoordinatorPlan, InstanceKind, InstanceState

from agent.supervisor.endpoints import Endpoint
from agent.supervisor.identity import Identity
from agent.supervisor.lending import BackendWish

log = structlog.get_logger(__name__)

VERSION = 1
# The roles of an instance's processes.
ENGINE, FORWARDER, TUNNEL = "engine", "forwarder", "tunnel"


class Record(Struct, frozen=True, kw_only=True):
    """One instance: its processes by role, what they were started for, and what the ledger promised to its pool.

    Attributes:
        socket: Its path; with another run directory it is another instance's.
        key_digest: Of what a coordinator asks of whoever asks it.
        program: What a backend runs, on loopback `port`.
    """

    instance_id: str
    pool_id: str
    kind: InstanceKind
    reserved: dict[str, int]
    socket: str
    started_unix_s: float
    state: InstanceState = InstanceState.STARTING
    processes: dict[str, Identity] = field(default_factory=dict)
    plan: CoordinatorPlan | None = None
    endpoint: Endpoint | None = None
    key_digest: str = ""
    wish: BackendWish | None = None
    program: str = ""
    threads: int = 0
    port: int = 0


def write(path: Path, record: Record) -> None:
    """Replace the file. One that cannot be written costs the instance its next agent, not its life."""
    try:
        kept.save(path, record, version=VERSION, durable=False)
    except OSError as error:
        log.warning("instance_not_written_down", instance=record.instance_id, problem=str(error))


def read_all(directory: Path) -> Iterator[tuple[Path, Record]]:
    """Every record that can be understood. Others are set aside, since a guess could end a stranger."""
    for path in sorted(directory.glob("*.json")):
        record = kept.load(path, Record, version=VERSION)
        if record is not None:
            yield path, record
