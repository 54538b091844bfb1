"""A supervisor over the fake or the real engine, for tests."""

import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
from sollol.report import CoordinatorPlan, DeviceShare, Instance, InstanceState

from agent.supervisor.endpoints import TcpSite
from agent.supervisor.files import Directories
from agent.supervisor.lending import BackendSite, BackendWish
from agent.supervisor.memory_log import OnLogged, nobody_asks
from agent.supervisor.owner import Limits
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


@contextlib.asynccontextmanager
async def supervising(
    tmp_path: Path,
    engine: tuple[str, ...],
    *,
    resolve: Callable[[str], Path] | None = None,
    limits: Limits = QUICK,
    restarts: RestartPolicy | None = None,
    on_gone: Callable[[Instance], None] = lambda _: None,
    site: BackendSite = NOTHING_TO_LEND,
    tcp: TcpSite | None = None,
    streams: Callable[[str], int] = lambda _: 0,
    on_logged: OnLogged = nobody_asks,
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
        on_gone=on_gone,
        on_logged=on_logged,
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
