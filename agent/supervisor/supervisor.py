"""All engines of this agent: started once per pool, watched by many, never left behind."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import structlog
from sollol.errors import Reason, Refusal, Retry, refuse
from sollol.report import BackendEndpoint, CoordinatorPlan, Instance, InstanceKind, InstanceState

from agent.supervisor import leftovers
from agent.supervisor.backend import Backend
from agent.supervisor.endpoints import Endpoints, TcpSite
from agent.supervisor.files import Directories, files_of, remove_oldest_logs
from agent.supervisor.instance import Coordinator
from agent.supervisor.launches import Launches
from agent.supervisor.lending import BackendSite, BackendWish, backend_id, forwarder_id
from agent.supervisor.memory_log import OnLogged, nobody_asks
from agent.supervisor.news import News
from agent.supervisor.owner import Limits, Owner
from agent.supervisor.ports import Ports
from agent.supervisor.restarts import Deaths, RestartPolicy

log = structlog.get_logger(__name__)

KEPT_RECORDS = 20
KEPT_RECORD_S = 600.0
_LONGEST_ID = 200
_CLOSE_MARGIN_S = 5.0


class Supervisor:
    """Owns every coordinator and every backend of the node.

    Args:
        engine: How to run llama-server, such as `("/usr/bin/llama-server",)`; empty when there is none.
        gpu_devices: That engine's names of its GPUs, in its order.
        resolve: The file of a model by name; raises SollolError for names it does not know.
        environment: Our own environment; engines get what they need of it and nothing else.
        site: How this node lends its devices.
        tcp: How coordinators listen beside their unix sockets; None: not at all.
        streams: How many streams an instance has open now.
        threads: Per engine, when nobody says; 0 leaves it to the engine.
        on_gone: Called when an instance's process is gone, before anybody is told: gives its reservation back.
        on_logged: Told what memory a coordinator has taken, as its log says, once it serves.
    """

    def __init__(
        self,
        *,
        engine: tuple[str, ...],
        gpu_devices: tuple[str, ...],
        resolve: Callable[[str], Path],
        environment: Mapping[str, str],
        directories: Directories,
        limits: Limits,
        site: BackendSite,
        tcp: TcpSite | None = None,
        streams: Callable[[str], int] = lambda _: 0,
        threads: int = 0,
        restarts: RestartPolicy | None = None,
        on_gone: Callable[[Instance], None] = lambda _: None,
        on_logged: OnLogged = nobody_asks,
    ) -> None:
        self._ports, self._endpoints = Ports(site.ports), Endpoints(tcp)
        self._launches = Launches(
            engine=engine,
            gpu_devices=gpu_devices,
            threads=threads,
            resolve=resolve,
            environment=environment,
            directories=directories,
            site=site,
            endpoints=self._endpoints,
            streams=streams,
            on_logged=on_logged,
        )
        self._directories, self._limits = directories, limits
        self._deaths = Deaths(restarts or RestartPolicy())
        self._on_gone = on_gone
        self._owners: dict[str, Owner] = {}
        self._news = News()
        self._closing = False
        directories.create()

    async def reap_leftovers(self) -> int:
        """End what a crashed agent left running; returns how many. Call it before the first start."""
        return await leftovers.reap(self._directories)

    async def start(self, pool_id: str, plan: CoordinatorPlan) -> Instance:
        """Start a coordinator and return at once. One that starts or serves under this id is left as it is.

        Raises:
            SollolError: BACKING_OFF (the model keeps dying here), INSTANCE_NOT_READY (this pool is just stopping),
                ENGINE_MISSING, PORT_TAKEN, INVALID_REQUEST, SHUTTING_DOWN, or whatever `resolve` says of the model.
        """
        existing = self._owners.get(pool_id)
        if existing is not None and existing.view.state in (InstanceState.STARTING, InstanceState.READY):
            return existing.view
        self._check_start(pool_id, existing)
        self._deaths.check(plan.model, now_s=self._now_s())
        launch = self._launches.coordinator(pool_id, plan)
        self._make_room(pool_id)
        coordinator = Coordinator(
            launch, self._limits, on_change=self._news.tell, on_gone=self._coordinator_gone, wait_after=self._wait_after
        )
        self._owners[pool_id] = coordinator
        return coordinator.view

    def _coordinator_gone(self, instance: Instance) -> None:
        self._endpoints.give_back(instance.instance_id)
        self._on_gone(instance)

    async def start_backend(self, wish: BackendWish) -> BackendEndpoint:
        """Start a backend and its forwarder, and return where to reach it once it answers and can be reached.

        One that starts or serves for this pool is left as it is. A caller that leaves early ends nothing.

        Raises:
            SollolError: ENGINE_MISSING, PORT_TAKEN, ENGINE_START_FAILED, ENGINE_STALLED, INSTANCE_NOT_READY (this
                pool's last one is just stopping), SHUTTING_DOWN.
        """
        instance_id = backend_id(wish.pool_id)
        existing = self._owners.get(instance_id)
        if isinstance(existing, Backend) and existing.view.state in (InstanceState.STARTING, InstanceState.READY):
            return await existing.endpoint()
        self._check_start(wish.pool_id, existing)
        launch = self._launches.backend(instance_id, wish)
        self._make_room(instance_id)
        backend = Backend(launch, self._limits, self._ports, on_change=self._news.tell, on_gone=self._on_gone)
        self._owners[instance_id] = backend
        return await backend.endpoint()

    def _make_room(self, instance_id: str) -> None:
        """Forget what is too old to keep, and the last one of this id: the order of records is the order of starts."""
        existing = self._owners.pop(instance_id, None)
        if existing is not None:
            existing.dismiss()
        self._forget_old_records()
        running = [files_of(name, self._directories).log for name in self._names_in_use()]
        remove_oldest_logs(self._directories.log, keep=running)

    def _names_in_use(self) -> list[str]:
        live = [item.view for item in self._owners.values() if item.is_live]
        forwarders = [forwarder_id(view.pool_id) for view in live if view.kind is InstanceKind.BACKEND]
        return [*(view.instance_id for view in live), *forwarders]

    def _check_start(self, pool_id: str, existing: Owner | None) -> None:
        if self._closing:
            raise refuse(Reason.SHUTTING_DOWN, "this agent is shutting down", retryable=True)
        if not 0 < len(pool_id) <= _LONGEST_ID:
            raise refuse(Reason.INVALID_REQUEST, f"a pool id has 1 to {_LONGEST_ID} characters")
        if existing is not None and existing.is_live:
            message = f"{pool_id} is just stopping; ask again when it is gone, or under another id"
            raise refuse(Reason.INSTANCE_NOT_READY, message, retryable=True, retry_after_s=self._limits.stop_grace_s)

    def watch(self, instance_id: str) -> AsyncIterator[Instance]:
        """Yield the present state, then every change; ends after READY, FAILED or STOPPED.

        Raises:
            SollolError: INSTANCE_NOT_FOUND.
        """
        return self._news.watch(self._find(instance_id).view)

    async def stop(self, instance_id: str, *, at_once: bool = False) -> None:
        """Return when the process is gone and its reservation given back. Unknown and ended ones are a success.

        A pool's id stops its coordinator and then its backend on this node; `at_once` by force.
        """
        for name in (instance_id, backend_id(instance_id)):
            owner = self._owners.get(name)
            if owner is not None and owner.is_live:
                await owner.stop(at_once=at_once)

    async def close(self) -> None:
        """Stop every engine, all at once; takes little more than the grace of one."""
        self._closing = True
        live = [item for item in self._owners.values() if item.is_live]
        try:
            async with asyncio.timeout(self._limits.stop_grace_s + _CLOSE_MARGIN_S):
                await asyncio.gather(*(item.stop() for item in live))
        except TimeoutError:
            log.exception("engines_not_gone", instances=[item.view.instance_id for item in live if item.is_live])
        await asyncio.gather(*(item.close() for item in self._owners.values()))

    def instances(self) -> tuple[Instance, ...]:
        """Every engine that runs, and those that failed not long ago."""
        self._forget_old_records()
        views = (item.view for item in self._owners.values())
        return tuple(view for view in views if view.state is not InstanceState.STOPPED)

    def socket_of(self, instance_id: str) -> Path:
        """Raises SollolError: INSTANCE_NOT_FOUND, INSTANCE_NOT_READY, INVALID_REQUEST for a backend."""
        coordinator = self._find(instance_id)
        if coordinator.view.kind is InstanceKind.BACKEND:
            raise refuse(Reason.INVALID_REQUEST, f"{instance_id} is a backend: only its coordinator takes requests")
        if coordinator.view.state is not InstanceState.READY:
            message = f"{instance_id} is {coordinator.view.state}, not ready to serve"
            raise refuse(Reason.INSTANCE_NOT_READY, message, retryable=True)
        return coordinator.files.socket

    def failure_of(self, instance_id: str) -> Refusal | None:
        """Why an instance's process is gone; None while it runs, and when the instance is unknown."""
        coordinator = self._owners.get(instance_id)
        if coordinator is None or coordinator.is_live:
            return None
        stopped = Refusal(reason=Reason.STOPPED, message=f"{instance_id} was stopped", retry=Retry.RETRYABLE)
        return coordinator.view.refusal or stopped

    def log_path(self, instance_id: str) -> Path:
        """The log of an instance, also of one that ended long ago; raises SollolError: INSTANCE_NOT_FOUND."""
        if instance_id in self._owners:
            return self._owners[instance_id].files.log
        path = files_of(instance_id, self._directories).log
        if not path.exists():
            self._find(instance_id)
        return path

    def plan_of(self, instance_id: str) -> CoordinatorPlan | None:
        """What a coordinator runs; None for backends and for what is unknown."""
        owner = self._owners.get(instance_id)
        return owner.plan if isinstance(owner, Coordinator) else None

    def pid_of(self, instance_id: str) -> int:
        """0 when it does not run; raises SollolError: INSTANCE_NOT_FOUND."""
        return self._find(instance_id).view.pid

    def subscribe(self, callback: Callable[[Instance], None]) -> Callable[[], None]:
        """Call `callback` with every change of every instance; returns what ends that."""
        return self._news.subscribe(callback)

    def _find(self, instance_id: str) -> Owner:
        try:
            return self._owners[instance_id]
        except KeyError:
            message = f"this node runs no instance {instance_id[:_LONGEST_ID]}; it may have ended long ago"
            raise refuse(Reason.INSTANCE_NOT_FOUND, message, retryable=True) from None

    def _wait_after(self, instance: Instance) -> float:
        return self._deaths.add(instance.model, now_s=self._now_s())

    def _forget_old_records(self) -> None:
        ended = [item for item in reversed(self._owners.values()) if item.ended_s is not None]
        for place, item in enumerate(ended):
            if place >= KEPT_RECORDS or self._now_s() - (item.ended_s or 0.0) > KEPT_RECORD_S:
                item.dismiss()
                del self._owners[item.view.instance_id]

    @staticmethod
    def _now_s() -> float:
        return asyncio.get_running_loop().time()
