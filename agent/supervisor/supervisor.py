"""All engines of this agent: started once per pool, watched by many, never left behind."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import structlog
from sollol.errors import Reason, Refusal, Retry, SollolError, refuse
from sollol.report import BackendEndpoint, CoordinatorPlan, Instance, InstanceKind, InstanceState, RpcTransport

from agent.supervisor import adoption
from agent.supervisor.adoption import Found
from agent.supervisor.backend import Backend
from agent.supervisor.cgroups import NO_CGROUPS, EngineCgroups
from agent.supervisor.endpoints import Endpoints, TcpSite
from agent.supervisor.files import Directories, files_of
from agent.supervisor.instance import Coordinator, Launch
from agent.supervisor.launches import Launches
from agent.supervisor.lending import BackendLaunch, BackendSite, BackendWish, backend_id
from agent.supervisor.memory_log import OnLogged, nobody_asks
from agent.supervisor.news import News
from agent.supervisor.orphans import Orphan, Orphans
from agent.supervisor.owner import Limits, Owner
from agent.supervisor.owners import LONGEST_ID, USEFUL, Owners
from agent.supervisor.ports import Ports
from agent.supervisor.promises import Promises
from agent.supervisor.restarts import NO_DEATH, Deaths, RestartPolicy
from agent.supervisor.tunnelling import Tunnels

log = structlog.get_logger(__name__)

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
        promises: Those of the ledger. An instance's is given back when its process is gone, before anybody is told.
        on_logged: Told what memory a coordinator has taken, as its log says, once it serves.
        cgroups: Those of engines.
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
        promises: Promises,
        tcp: TcpSite | None = None,
        streams: Callable[[str], int] = lambda _: 0,
        threads: int = 0,
        restarts: RestartPolicy | None = None,
        on_logged: OnLogged = nobody_asks,
        cgroups: EngineCgroups = NO_CGROUPS,
    ) -> None:
        self._ports, self._endpoints = Ports(site.loopback_ports), Endpoints(tcp)
        self._site, self._tunnels = site, Tunnels(site, self._ports)
        self._launches = Launches(
            engine=engine,
            gpu_devices=gpu_devices,
            threads=threads,
            resolve=resolve,
            environment=environment,
            directories=directories,
            site=site,
            endpoints=self._endpoints,
            tunnels=self._tunnels,
            streams=streams,
            on_logged=on_logged,
            cgroups=cgroups,
        )
        self._directories, self._limits = directories, limits
        self._deaths = Deaths(restarts or RestartPolicy())
        self._orphans = Orphans(directories, ttl_s=limits.orphan_ttl_s, grace_s=limits.stop_grace_s)
        self._promises = promises
        self._owners = Owners(directories)
        self._news = News()
        self._closing = False
        directories.create()

    @property
    def transport(self) -> RpcTransport:
        """How bytes between this node's engines and other nodes' go."""
        return self._site.transport

    def adopt(self) -> int:
        """Take up what an earlier agent left running; returns how many instances. Call it before the first start.

        What nobody can account for is ended after `orphan_ttl_s`, what is known to be but half of itself at once.
        """
        known: set[int] = set()
        for found in adoption.found_in(self._directories):
            known.update(process.pid for process in found.running.values())
            try:
                self._adopt(found)
            except SollolError as error:
                orphan = Orphan(found.record.instance_id, found.running.values(), found.record)
                self._orphans.add(orphan, error.refusal.message, at_once=bool(found.problem))
        for pid, process in adoption.unrecorded(self._directories, known).items():
            self._orphans.add(Orphan(str(pid), (process,)), "no record names it")
        return len(self._owners.live())

    def _adopt(self, found: Found) -> None:
        record, name = found.record, found.record.instance_id
        if found.problem:
            raise refuse(Reason.INSTANCE_NOT_FOUND, found.problem)
        self._promises.restore(record.pool_id, name, record.reserved)
        try:
            owner = self._owner_again(found)
        except SollolError:
            self._promises.freed(record.pool_id, name)
            raise
        self._owners.add(owner)
        pids = {role: process.pid for role, process in found.running.items()}
        log.info("instance_adopted", instance=name, state=owner.view.state, pids=pids)
        self._news.tell(owner.view)

    def _owner_again(self, found: Found) -> Owner:
        record, running = found.record, found.running
        if record.wish is not None:
            lent = self._launches.backend_again(record, record.wish, running)
            return self._backend(lent)
        if record.plan is None or record.endpoint is None:
            raise refuse(Reason.INVALID_REQUEST, "its record does not say what it was started for")
        return self._coordinator(self._launches.coordinator_again(record, record.plan, record.endpoint, running))

    async def start(self, pool_id: str, plan: CoordinatorPlan) -> Instance:
        """Start a coordinator and return at once. One that starts or serves under this id is left as it is.

        Raises:
            SollolError: BACKING_OFF (the model keeps dying here), INSTANCE_NOT_READY (this pool is just stopping),
                ENGINE_MISSING, PORT_TAKEN, INVALID_REQUEST, SHUTTING_DOWN, or whatever `resolve` says of the model.
        """
        existing = self._owners.get(pool_id)
        if existing is not None and existing.view.state in USEFUL:
            return existing.view
        self._check_start(pool_id, existing)
        self._deaths.check(plan.model, now_s=self._now_s())
        self._owners.make_room(pool_id, now_s=self._now_s())
        launch = self._launches.coordinator(pool_id, plan, self._promises.held(pool_id))
        coordinator = self._coordinator(launch)
        self._owners.add(coordinator)
        return coordinator.view

    def _coordinator(self, launch: Launch) -> Coordinator:
        return Coordinator(
            launch, self._limits, on_change=self._news.tell, on_gone=self._coordinator_gone, wait_after=self._wait_after
        )

    def _coordinator_gone(self, instance: Instance) -> None:
        self._endpoints.give_back(instance.instance_id)
        self._tunnels.give_back(instance.instance_id)
        self._backend_gone(instance)

    def _backend_gone(self, instance: Instance) -> None:
        self._promises.freed(instance.pool_id, instance.instance_id)

    async def start_backend(self, wish: BackendWish) -> BackendEndpoint:
        """Start a backend and its forwarder, and return where to reach it once it answers and can be reached.

        One that starts or serves for this pool is left as it is. A caller that leaves early ends nothing.

        Raises:
            SollolError: ENGINE_MISSING, PORT_TAKEN, ENGINE_START_FAILED, ENGINE_STALLED, INSTANCE_NOT_READY (this
                pool's last one is just stopping), SHUTTING_DOWN.
        """
        instance_id = backend_id(wish.pool_id)
        existing = self._owners.get(instance_id)
        if isinstance(existing, Backend) and existing.view.state in USEFUL:
            return await existing.endpoint()
        self._check_start(wish.pool_id, existing)
        launch = self._launches.backend(instance_id, wish, self._promises.held(wish.pool_id))
        self._owners.make_room(instance_id, now_s=self._now_s())
        backend = self._backend(launch)
        self._owners.add(backend)
        return await backend.endpoint()

    def _backend(self, launch: BackendLaunch) -> Backend:
        return Backend(launch, self._limits, self._ports, on_change=self._news.tell, on_gone=self._backend_gone)

    def _check_start(self, pool_id: str, existing: Owner | None) -> None:
        if self._closing:
            raise refuse(Reason.SHUTTING_DOWN, "this agent is shutting down", retryable=True)
        if not 0 < len(pool_id) <= LONGEST_ID:
            raise refuse(Reason.INVALID_REQUEST, f"a pool id has 1 to {LONGEST_ID} characters")
        if self._orphans.has(pool_id) or self._orphans.has(backend_id(pool_id)):
            message = f"processes of {pool_id} are here that nobody can account for; take another id"
            raise refuse(Reason.INSTANCE_NOT_READY, message, retryable=True)
        if existing is not None and existing.is_live:
            message = f"{pool_id} is just stopping; ask again when it is gone, or under another id"
            raise refuse(Reason.INSTANCE_NOT_READY, message, retryable=True, retry_after_s=self._limits.stop_grace_s)

    def watch(self, instance_id: str) -> AsyncIterator[Instance]:
        """Yield the present state, then every change; ends after READY, FAILED or STOPPED.

        Raises:
            SollolError: INSTANCE_NOT_FOUND.
        """
        return self._news.watch(self._owners.find(instance_id).view)

    async def stop(self, instance_id: str, *, at_once: bool = False) -> None:
        """Return when the process is gone and its reservation given back. Unknown and ended ones are a success.

        A pool's id stops its coordinator and then its backend on this node; `at_once` by force.
        """
        for name in (instance_id, backend_id(instance_id)):
            owner = self._owners.get(name)
            if owner is not None and owner.is_live:
                await owner.stop(at_once=at_once)

    async def close(self, *, leave: bool = False) -> None:
        """Stop every engine, all at once; takes little more than the grace of one.

        Args:
            leave: Those that start or serve run on instead, for the next agent to take up.
        """
        self._closing = True
        if leave:
            await self._owners.leave()
        await self._orphans.close(leave=leave)
        live = self._owners.live()
        try:
            async with asyncio.timeout(self._limits.stop_grace_s + _CLOSE_MARGIN_S):
                await asyncio.gather(*(item.stop() for item in live))
        except TimeoutError:
            log.exception("engines_not_gone", instances=[item.view.instance_id for item in live if item.is_live])
        await asyncio.gather(*(item.close() for item in self._owners))

    def instances(self) -> tuple[Instance, ...]:
        """Every engine that runs, and those that failed not long ago."""
        self._owners.forget_old(now_s=self._now_s())
        views = (item.view for item in self._owners)
        return tuple(view for view in views if view.state is not InstanceState.STOPPED)

    def socket_of(self, instance_id: str) -> Path:
        """Raises SollolError: INSTANCE_NOT_FOUND, INSTANCE_NOT_READY, INVALID_REQUEST for a backend."""
        coordinator = self._owners.find(instance_id)
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
        if (owner := self._owners.get(instance_id)) is not None:
            return owner.files.log
        path = files_of(instance_id, self._directories).log
        if not path.exists():
            self._owners.find(instance_id)
        return path

    def plan_of(self, instance_id: str) -> CoordinatorPlan | None:
        """What a coordinator runs; None for backends and for what is unknown."""
        owner = self._owners.get(instance_id)
        return owner.plan if isinstance(owner, Coordinator) else None

    def subscribe(self, callback: Callable[[Instance], None]) -> None:
        """Call `callback` with every change of every instance."""
        self._news.subscribe(callback)

    def _wait_after(self, instance: Instance) -> float:
        if instance.refusal is not None and instance.refusal.reason in NO_DEATH:
            return 0.0
        return self._deaths.add(instance.model, now_s=self._now_s())

    @staticmethod
    def _now_s() -> float:
        return asyncio.get_running_loop().time()
