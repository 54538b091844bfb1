"""Composes this node's report, owns the newest one, and tells it to heads and to the registry."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

import sollol
import structlog
from sollol.certified import expires_in_s
from sollol.correction import MemoryCorrection
from sollol.engine import Engine
from sollol.errors import Reason, refuse
from sollol.link import Link
from sollol.registry import RegistryUnavailable
from sollol.report import Device, Instance, Model, Report, Reservation, RpcTransport
from sollol.speed import SpeedObservation
from sollol.tls import TlsFiles

from agent.bandwidth import boot_id, usable_cores
from agent.config import AgentConfig
from agent.materialised import materialised
from agent.threads import SlowReading

log = structlog.get_logger(__name__)

FIRST_SCAN_WITHIN_S = 5.0  # a node does not stay away because one of its disks hangs
OVERDUE_SCAN_POLL_S = 1.0
REPORT_GAP_S = 0.02
PUBLISH_GAP_S = 0.2
WITHDRAW_WITHIN_S = 1.5


class Measuring(Protocol):
    async def measure(self) -> tuple[Device, ...]: ...


class Inventory(Protocol):
    def scan(self) -> tuple[Model, ...]:
        """Look through the disks; blocks, raises OSError."""
        ...


class Promises(Protocol):
    def reservations(self) -> tuple[Reservation, ...]: ...

    def with_ledger(
        self, devices: Sequence[Device], materialised: Mapping[str, Mapping[str, int]]
    ) -> tuple[Device, ...]: ...


class Running(Protocol):
    def instances(self) -> tuple[Instance, ...]: ...


class Measured(Protocol):
    def all(self) -> tuple[Link, ...]: ...


class Observing(Protocol):
    def observations(self) -> tuple[SpeedObservation, ...]: ...


class Cordoned(Protocol):
    @property
    def cordoned(self) -> bool: ...

    @property
    def draining(self) -> bool: ...


class Learning(Protocol):
    def corrections(self) -> tuple[MemoryCorrection, ...]: ...


class NoticeBoard(Protocol):
    async def publish(self, report: Report, lease_s: float) -> bool: ...

    async def withdraw(self, report: Report) -> None: ...


class Reporter:
    """`run()` keeps the report fresh: every heartbeat, and at once when somebody calls `changed()`.

    Args:
        registry: None: reports go to watching heads only.
        token: Which agent of this node's name it is.
        engines_unlimited: Why the kernel enforces no memory limit on engines; empty: it does.
    """

    def __init__(
        self,
        *,
        config: AgentConfig,
        probe: Measuring,
        inventory: Inventory,
        ledger: Promises,
        supervisor: Running,
        links: Measured,
        speeds: Observing,
        learned: Learning,
        cordon: Cordoned,
        engine: Engine | None,
        registry: NoticeBoard | None,
        rpc_transport: RpcTransport = RpcTransport.DIRECT,
        tls: TlsFiles | None = None,
        token: str = "",
        engines_unlimited: str = "",
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._probe = probe
        self._ledger = ledger
        self._supervisor = supervisor
        self._links = links
        self._speeds = speeds
        self._learned = learned
        self._cordon = cordon
        self._engine = engine
        self._rpc_transport = rpc_transport
        self._tls = tls
        self._registry, self._token, self._engines_unlimited = registry, token, engines_unlimited
        self._wall_clock = wall_clock
        self._boot_id = boot_id()
        self._scan: SlowReading[tuple[Model, ...]] = SlowReading(
            inventory.scan, initial=(), name="model scan", deadline_s=FIRST_SCAN_WITHIN_S
        )
        self._models: tuple[Model, ...] = ()
        self._scanned = asyncio.Event()
        self._rescan = asyncio.Event()
        self._scan_problem = ""
        self._report: Report | None = None
        self._dirty = asyncio.Event()
        self._news = asyncio.Event()  # set, and replaced, with every report
        self._registry_lost = self._id_in_use = False

    def current(self) -> Report:
        """The newest report.

        Raises:
            SollolError: STALE_REPORT; nothing has been measured yet (wait for `ready`).
        """
        if self._report is None:
            raise refuse(Reason.STALE_REPORT, "this node has not measured itself yet: ask again", retryable=True)
        return self._report

    def unified_gpus(self) -> frozenset[str]:
        """Ids of those that take their memory from the CPU's; none before the first report."""
        devices = self._report.devices if self._report is not None else ()
        return frozenset(device.device_id for device in devices if device.unified)

    def summary(self) -> str:
        """What runs here, in a few words."""
        report = self.current()
        streams = sum(instance.active_streams for instance in report.instances)
        return f"{len(report.instances)} engines, {streams} streams, {len(report.models)} models"

    async def ready(self) -> Report:
        """The first report, as soon as there is one."""
        while self._report is None:
            await self._news.wait()
        return self._report

    async def watch(self) -> AsyncIterator[Report]:
        """The newest report, then every newer one. A slow reader misses those in between, never the last."""
        seen: Report | None = None
        while True:
            news = self._news
            if self._report is not None and self._report is not seen:
                seen = self._report
                yield seen
            else:
                await news.wait()

    def changed(self) -> None:
        """Report as soon as possible: something that a report shows has changed. Calls that come together are one."""
        self._dirty.set()

    def use(self, config: AgentConfig) -> None:
        """Go on with these settings: look for models and report at once."""
        self._config = config
        self._rescan.set()
        self.changed()

    async def run(self) -> None:
        """Measure, report and publish until cancelled; then withdraw from the registry."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._scan_models(), name="scan models")
                tasks.create_task(self._keep_reporting(), name="report")
                if self._registry is not None:
                    tasks.create_task(self._keep_publishing(self._registry), name="publish")
        finally:
            if self._registry is not None and self._report is not None:
                await self._withdraw(self._registry, self._report)

    async def _scan_models(self) -> None:
        while True:
            try:
                models = (await self._scan.newest()).value
            except OSError as error:  # a directory that cannot be read: what was found before may still be there
                self._tell_scan_problem(str(error))
            else:
                self._tell_scan_problem(f"no end within {FIRST_SCAN_WITHIN_S} s" if self._scan.overdue else "")
                if models != self._models:
                    self._models = models  # an unchanged list stays the same object: watchers skip it then
                    self.changed()
            self._scanned.set()
            with suppress(TimeoutError):
                async with asyncio.timeout(OVERDUE_SCAN_POLL_S if self._scan.overdue else self._config.rescan_s):
                    await self._rescan.wait()
            self._rescan.clear()

    def _tell_scan_problem(self, problem: str) -> None:
        if problem and problem != self._scan_problem:
            log.warning("model_scan_failed", problem=problem, models_kept=len(self._models))
        self._scan_problem = problem

    async def _keep_reporting(self) -> None:
        await self._scanned.wait()
        while True:
            self._dirty.clear()
            await self._refresh()
            await asyncio.sleep(REPORT_GAP_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._config.heartbeat_s):
                    await self._dirty.wait()

    async def _refresh(self) -> None:
        measured = await self._probe.measure()
        # From here nothing waits: devices, instances and reservations of one report belong together.
        instances = self._supervisor.instances()
        config = self._config
        self._report = Report(
            node_id=config.node_id,
            host=config.host,
            port=config.port,
            boot_id=self._boot_id,
            sequence=self._report.sequence + 1 if self._report else 1,
            measured_unix_s=self._wall_clock(),
            cpu_count=usable_cores(),
            devices=self._ledger.with_ledger(measured, materialised(instances)),
            engine=self._engine,
            models=self._models,
            instances=instances,
            reservations=self._ledger.reservations(),
            labels=dict(config.labels),
            version=sollol.__version__,
            links=self._links.all(),
            speeds=self._speeds.observations(),
            memory=self._learned.corrections(),
            cordoned=self._cordon.cordoned,
            draining=self._cordon.draining,
            rpc_transport=self._rpc_transport,
            certificate_expires_in_s=expires_in_s(self._tls) if self._tls is not None else None,
            agent_token=self._token,
            engines_unlimited=self._engines_unlimited,
        )
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _keep_publishing(self, registry: NoticeBoard) -> None:
        """A slow or lost registry delays nobody: this task alone waits for it, and then sends the newest."""
        async for report in self.watch():
            try:
                self._tell_id_in_use(not await registry.publish(report, self._config.lease_s))
            except RegistryUnavailable as error:
                if not self._registry_lost:
                    log.warning("registry_lost", problem=str(error))
                self._registry_lost = True
            else:
                if self._registry_lost:
                    log.info("registry_regained")
                self._registry_lost = False
            await asyncio.sleep(PUBLISH_GAP_S)

    def _tell_id_in_use(self, in_use: bool) -> None:
        """It is told, not obeyed: whoever can write to the registry could end agents otherwise."""
        if in_use and not self._id_in_use:
            log.error("node_id_in_use", node=self._config.node_id, hint="another agent of this name is in the registry")
        self._id_in_use = in_use

    async def _withdraw(self, registry: NoticeBoard, report: Report) -> None:
        try:
            async with asyncio.timeout(WITHDRAW_WITHIN_S):
                await registry.withdraw(report)
        except (RegistryUnavailable, TimeoutError) as error:  # its lease ends by itself
            log.info("report_not_withdrawn", problem=str(error) or "no answer in time")
