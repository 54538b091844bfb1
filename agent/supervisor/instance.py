"""One coordinator and its only owner: a task that starts the process, watches it and sees it gone."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import structlog
from sollol.errors import Refusal
from sollol.report import CoordinatorPlan, Instance, InstanceState

from agent.supervisor.cgroups import EngineCgroup
from agent.supervisor.comparison import with_logged
from agent.supervisor.failure import (
    KEPT_LINES,
    backend_lost,
    classify,
    frozen,
    no_tunnel,
    over_limit,
    stalled,
    unreachable,
)
from agent.supervisor.files import InstanceFiles, keep_short, last_lines
from agent.supervisor.health import health
from agent.supervisor.links import backend_links
from agent.supervisor.memory_log import OnLogged, logged_memory
from agent.supervisor.owner import Exited, Limits, Owner, cannot_run
from agent.supervisor.process import EngineProcess, bytes_read, spawn_coordinator, spawn_server
from agent.supervisor.progress import newest_percent
from agent.supervisor.records import ENGINE, TUNNEL, Record
from agent.supervisor.standstill import Standstill
from agent.supervisor.state import Event, after
from agent.supervisor.tunnelling import TunnelLaunch, TunnelWatch, tunnel_argv

log = structlog.get_logger(__name__)

_READ_BYTES = 64 * 1024
_TUNNEL_GRACE_S = 1.0


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """Everything to start one coordinator; its instance id is its pool's id.

    Attributes:
        record: What is written down of it.
        running: Those of its processes that an earlier agent started, by role.
        key: What it asks of whoever asks it.
        tunnel: To its backends on other nodes; the plan has its ports. None: they are reached directly.
        node_id: Our own.
        streams: Those it has open now.
        on_logged: Told what memory it has taken, once it serves.
    """

    plan: CoordinatorPlan
    record: Record
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    files: InstanceFiles
    node_id: str
    streams: Callable[[], int]
    on_logged: OnLogged
    cgroup: EngineCgroup
    running: Mapping[str, EngineProcess] = msgspec.field(default_factory=dict)
    key: str = ""
    tunnel: TunnelLaunch | None = None


class Coordinator(Owner):
    """Starts its process when made, or takes up one that runs, in the state that it had reached."""

    def __init__(
        self,
        launch: Launch,
        limits: Limits,
        *,
        on_change: Callable[[Instance], None],
        on_gone: Callable[[Instance], None],
        wait_after: Callable[[Instance], float],
    ) -> None:
        record = launch.record
        ready = bool(launch.running) and record.state is InstanceState.READY
        view = Instance(
            instance_id=record.instance_id,
            pool_id=record.pool_id,
            model=launch.plan.model,
            state=InstanceState.READY if ready else InstanceState.STOPPED,
            percent=100.0 if ready else 0.0,
            parallel=launch.plan.parallel,
            context_per_slot=launch.plan.context_per_slot,
            shares=launch.plan.shares,
            pool_number=launch.plan.pool_number,
            endpoint=record.endpoint.url if record.endpoint else "",
            predicted_ms_per_token=launch.plan.predicted_ms_per_token,
            started_unix_s=record.started_unix_s,
        )
        self.plan = launch.plan
        self._launch = launch
        self._tunnel: TunnelWatch | None = None
        super().__init__(
            view,
            record,
            launch.files,
            limits,
            launch.cgroup,
            on_change=on_change,
            on_gone=on_gone,
            wait_after=wait_after,
        )

    async def _serve_until_gone(self) -> Refusal | None:
        launch = self._launch.tunnel
        if launch is None:
            return await self._serve()
        argv = tunnel_argv(launch, gone_after_s=self._limits.gone_after_s)
        try:
            process = self._launch.running.get(TUNNEL) or spawn_server(
                argv, launch.environment, launch.files, told=launch.secret
            )
        except OSError as error:
            return cannot_run(argv[0], error)
        try:
            async with self._watched(TUNNEL, process) as exited:
                self._tunnel = TunnelWatch(process.pid, exited, launch, every_s=self._limits.freeze_poll_s)
                taken_up = bool(self._launch.running)  # listens already, and has an engine that must be seen gone
                refusal = None if taken_up else await self._until_tunnelled(self._tunnel)
                if taken_up or (refusal is None and not self._asked_to_stop.done()):
                    refusal = await self._serve()
                self._announce_stop()
                await process.stop(exited, min(self._grace_s, _TUNNEL_GRACE_S))
                return refusal
        finally:
            self._clear(launch.files, self.files)

    async def _until_tunnelled(self, tunnel: TunnelWatch) -> Refusal | None:
        """Return None when the engine can connect to it, or shall stop."""
        clock = asyncio.get_running_loop().time
        until = clock() + self._limits.connect_timeout_s
        while not tunnel.listens() and not self._asked_to_stop.done():
            if tunnel.exited.done() or clock() > until:
                return tunnel.not_started(self.view.model)
            await self._next_event(tunnel.exited, timeout_s=self._limits.poll_s)
        return None

    async def _serve(self) -> Refusal | None:
        try:
            process = self._launch.running.get(ENGINE) or spawn_coordinator(
                self._launch.argv, self._launch.environment, self.files
            )
        except OSError as error:
            return cannot_run(self._launch.argv[0], error)
        try:
            async with self._watched(ENGINE, process) as exited:
                self._announce(pid=process.pid)
                standstill = Standstill(
                    process.pid,
                    self._launch.plan,
                    self.files.socket,
                    key=self._launch.key,
                    streams=self._launch.streams,
                    every_s=self._limits.freeze_poll_s,
                )
                loads = self.view.state is InstanceState.STARTING
                refusal = await self._until_ready(process, exited, standstill) if loads else None
                if refusal is None:
                    refusal = await self._until_ended(process.pid, exited, standstill)
                self._announce_stop()
                if not exited.done():
                    await process.stop(exited, self._grace_s)
                return self._why(exited.result(), refusal)
        finally:
            self._clear(self.files)

    async def _until_ready(self, process: EngineProcess, exited: Exited, standstill: Standstill) -> Refusal | None:
        """Return None when it serves, ended or shall stop; a refusal when it is frozen or moves too slowly."""
        clock = asyncio.get_running_loop().time
        began = moved = clock()
        signs = _SignsOfLoading(self.files.progress, process.pid)
        # It connects to its backends before anything else, without a word and for ever.
        connected = not self._launch.plan.backends
        while not exited.done() and not self._asked_to_stop.done():
            status = await health(self.files.socket)
            connected = connected or status is not None
            if status == 200:
                self._announce(state=after(self.view.state, Event.HEALTHY), percent=100.0)
                log.info("coordinator_ready", model=self.view.model, took_s=round(clock() - began, 3))
                return None
            if signs.moved():
                moved = clock()
                self._announce_percent(signs.percent)
            elif (refusal := self._overdue(clock() - moved, connected=connected)) is not None:
                return self._lost(refusal)
            if wrong := await standstill.seen():
                return self._frozen(wrong)
            if (refusal := self._without_tunnel()) is not None:
                return self._lost(refusal)
            await self._next_event(exited, timeout_s=self._limits.poll_s)
        return None

    async def _until_ended(self, pid: int, exited: Exited, standstill: Standstill) -> Refusal | None:
        """Return None when it has ended or shall stop; a refusal when it cannot serve and does not know."""
        plan = self._launch.plan
        links = await backend_links(pid, plan) if plan.backends else None
        ends = (exited, self._tunnel.exited) if self._tunnel is not None else (exited,)
        comparing = asyncio.create_task(self._compare(plan), name=f"compare the memory of {self.view.instance_id}")
        try:
            while not exited.done() and not self._asked_to_stop.done():
                backend = links.lost() if links is not None else None
                if (refusal := self._without_tunnel()) is not None:  # asked later: it may be why a backend is lost
                    return self._lost(refusal)
                if backend is not None:
                    return self._lost(backend_lost(plan.model, backend, last_lines(self.files.log, KEPT_LINES)))
                if wrong := await standstill.seen():
                    return self._frozen(wrong)
                if comparing.done():  # else the sizes at its beginning are still to be read
                    keep_short(self.files.log, self._limits.most_log_bytes)
                await self._next_event(*ends, timeout_s=self._limits.freeze_poll_s)
        finally:
            comparing.cancel()
        return None

    async def _compare(self, plan: CoordinatorPlan) -> None:
        """Show what memory it has taken beside what was planned, and let others learn from it."""
        try:
            logged = await logged_memory(self.files.log, plan, self._launch.node_id)
            if not logged:
                log.info("memory_not_compared", model=plan.model, why="the log lacks sizes of some device")
                return
            await self._launch.on_logged(plan, logged)
            self._announce(shares=with_logged(self.view.shares, logged))
        except Exception:  # it serves all the same
            log.exception("memory_not_compared", model=plan.model)

    def _frozen(self, wrong: str) -> Refusal:
        self._grace_s = 0.0  # it would not hear that it shall end
        return self._lost(frozen(self.view.model, wrong, last_lines(self.files.log, KEPT_LINES)))

    def _without_tunnel(self) -> Refusal | None:
        """What its tunnel has come to, when that cannot carry its bytes any more."""
        tunnel = self._tunnel
        if tunnel is None or not (wrong := tunnel.dead() or tunnel.frozen()):
            return None
        self._grace_s = 0.0  # it may wait for a backend, and would not hear that it shall end
        return no_tunnel(self.view.model, wrong, last_lines(self.files.log, KEPT_LINES))

    def _overdue(self, waited_s: float, *, connected: bool) -> Refusal | None:
        limits, model = self._limits, self.view.model
        if not connected and waited_s > min(limits.connect_timeout_s, limits.start_timeout_s):
            tail = last_lines(self.files.log, KEPT_LINES)
            return unreachable(model, self._launch.plan.backends, waited_s, tail)
        if waited_s > limits.start_timeout_s:
            return stalled(model, waited_s, last_lines(self.files.log, KEPT_LINES))
        return None

    def _why(self, exit_code: int | None, known: Refusal | None) -> Refusal | None:
        if self.view.state is InstanceState.STOPPING or known is not None:
            return known
        if self._tunnel is not None and (wrong := self._tunnel.dead()):
            return no_tunnel(self.view.model, wrong, last_lines(self.files.log, KEPT_LINES))
        if (limit_bytes := self._launch.cgroup.out_of_memory()) is not None:
            return over_limit(self.view.model, limit_bytes, last_lines(self.files.log, KEPT_LINES))
        backends = self._launch.plan.backends
        return classify(
            exit_code,
            last_lines(self.files.log, 2 * KEPT_LINES),
            was_ready=self.view.state is InstanceState.READY,
            model=self.view.model,
            backends=(self._tunnel.broken(backends) if self._tunnel is not None else ()) or backends,
        )

    def _announce_percent(self, percent: float) -> None:
        """Tell of whole percents only: watchers get at most a hundred of them."""
        if int(percent) > int(self.view.percent):
            self._announce(percent=min(percent, 99.0))


class _SignsOfLoading:
    """What shows that a load goes on: the percent it prints, or bytes that it reads (some engines print nothing)."""

    def __init__(self, progress: Path, pid: int) -> None:
        self.percent = 0.0
        self._progress, self._pid = progress, pid
        self._offset = 0
        self._bytes_read = 0

    def moved(self) -> bool:
        before = (self.percent, self._bytes_read)
        percent, whole = newest_percent(self._new_output())
        self._offset += whole
        self.percent = max(self.percent, percent or 0.0)
        self._bytes_read = bytes_read(self._pid)
        return (self.percent, self._bytes_read) != before

    def _new_output(self) -> bytes:
        try:
            with self._progress.open("rb") as file:
                file.seek(self._offset)
                return file.read(_READ_BYTES)
        except FileNotFoundError:
            return b""  # somebody tidied up; the engine is still asked whether it serves
