"""A supervisor over the fake or the real engine, for tests."""

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import psutil
from sollol import kept
from sollol.errors import SollolError
from sollol.report import CoordinatorPlan, DeviceShare, Instance, InstanceState

from agent.supervisor import records
from agent.supervisor.cgroups import NO_CGROUPS, EngineCgroups
from agent.supervisor.endpoints import TcpSite
from agent.supervisor.files import Directories, files_of
from agent.supervisor.lending import BackendSite, BackendWish
from agent.supervisor.memory_log import OnLogged, nobody_asks
from agent.supervisor.owner import Limits
from agent.supervisor.records import Record
from agent.supervisor.restarts import RestartPolicy
from agent.supervisor.supervisor import Supervisor

QUICK = Limits(start_timeout_s=10, stop_grace_s=0.5, poll_s=0.02)
RPC_PORTS = range(17_500, 17_700)


def site_of(program: Path | None, node_id: str = "n1", ports: range = RPC_PORTS) -> BackendSite:
    return BackendSite(program=program, node_id=node_id, host="127.0.0.1", listen="127.0.0.1", ports=ports)


NOTHING_TO_LEND = site_of(None)


def wish_of(pool_id: str, **changes: object) -> BackendWish:
    fields = {"bytes": {"CPU": 1 << 20}, "allowed_hosts": ("127.0.0.1",), "attach_within_s": 20.0, "threads": 1}
    return BackendWish(pool_id=pool_id, **(fields | changes))


def directories(tmp_path: Path) -> Directories:
    return Directories(log=tmp_path / "log", run=tmp_path / "run", state=tmp_path / "state")


def record_of(tmp_path: Path, instance_id: str) -> Record:
    record = kept.load(files_of(instance_id, directories(tmp_path)).state, Record, version=records.VERSION)
    assert record is not None, f"{instance_id} has no record"
    return record


def plan_of(model: str, *, layers: int = 9, context_per_slot: int = 512, parallel: int = 2) -> CoordinatorPlan:
    shares = (DeviceShare(device_id="CPU", layers=layers),)
    return CoordinatorPlan(model=model, parallel=parallel, context_per_slot=context_per_slot, shares=shares, threads=1)


def models_in(directory: Path) -> Callable[[str], Path]:
    """Resolve a model to a file of its name, written as an empty one when it is not there."""

    def resolve(model: str) -> Path:
        path = directory / f"{model}.gguf"
        if not path.exists():
            path.write_bytes(b"GGUF")
        return path

    return resolve


class Promised:
    """Plays the ledger: everybody holds the same, `gone` and `restored` are instances in order."""

    def __init__(self, on_gone: Callable[[str], None] = lambda _: None, refusal: SollolError | None = None) -> None:
        self.gone: list[str] = []
        self.restored: list[tuple[str, dict[str, int]]] = []
        self._on_gone, self._refusal = on_gone, refusal

    def held(self, _pool_id: str) -> dict[str, int]:
        return {"CPU": 1 << 20}

    def restore(self, _pool_id: str, instance_id: str, bytes_by_device: Mapping[str, int]) -> None:
        if self._refusal is not None:
            raise self._refusal
        self.restored.append((instance_id, dict(bytes_by_device)))

    def freed(self, _pool_id: str, instance_id: str) -> None:
        self.gone.append(instance_id)
        self._on_gone(instance_id)


@contextlib.asynccontextmanager
async def supervising(
    tmp_path: Path,
    engine: tuple[str, ...],
    *,
    resolve: Callable[[str], Path] | None = None,
    limits: Limits = QUICK,
    restarts: RestartPolicy | None = None,
    promises: Promised | None = None,
    site: BackendSite = NOTHING_TO_LEND,
    tcp: TcpSite | None = None,
    streams: Callable[[str], int] = lambda _: 0,
    on_logged: OnLogged = nobody_asks,
    cgroups: EngineCgroups = NO_CGROUPS,
) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(
        engine=engine,
        gpu_devices=(),
        resolve=resolve or models_in(tmp_path),
        environment=os.environ,
        directories=directories(tmp_path),
        limits=limits,
        site=site,
        tcp=tcp,
        streams=streams,
        threads=1,
        restarts=restarts,
        promises=promises or Promised(),
        on_logged=on_logged,
        cgroups=cgroups,
    )
    try:
        yield supervisor
    finally:
        await supervisor.close()


async def settled(supervisor: Supervisor, instance_id: str) -> Instance:
    """Watch an instance to the end of the watch and return its last state."""
    return (await changes_of(supervisor, instance_id))[-1]


async def changes_of(supervisor: Supervisor, instance_id: str) -> list[Instance]:
    return [instance async for instance in supervisor.watch(instance_id)]


async def started(supervisor: Supervisor, instance_id: str, plan: CoordinatorPlan) -> Instance:
    await supervisor.start(instance_id, plan)
    instance = await settled(supervisor, instance_id)
    assert instance.state is InstanceState.READY, instance
    return instance


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
