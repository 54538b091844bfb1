"""One backend and its only owner: starts the process that lends devices and its forwarder, and sees both gone.

Each is of no use without the other, so they end together. The backend is asked once whether it answers, before anybody
can reach it, and never again; what it does afterwards is seen by the process and by the forwarder.
"""

import asyncio
from collections.abc import Callable, Iterator

import structlog
from msgspec.structs import replace
from sollol.errors import Reason, Refusal, Retry, SollolError
from sollol.report import BackendEndpoint, DeviceShare, Instance, InstanceKind, InstanceState

from agent.forwarder.status import NO_FREE_PORT, Status, read_status
from agent.supervisor.command import CPU, backend_argv
from agent.supervisor.failure import KEPT_LINES, ended, killed_for_memory
from agent.supervisor.files import keep_short, last_lines
from agent.supervisor.freeze import FreezeWatch, look_at
from agent.supervisor.handshake import HandshakeFailedError, greet, listens
from agent.supervisor.lending import BackendLaunch, endpoint_of, forwarder_argv
from agent.supervisor.owner import Exited, Limits, Owner, cannot_run
from agent.supervisor.ports import LOOPBACK, Ports
from agent.supervisor.process import EngineProcess, spawn_server
from agent.supervisor.records import ENGINE, FORWARDER
from agent.supervisor.state import Event, after
from agent.supervisor.strangers import stranger_at

log = structlog.get_logger(__name__)

_ATTEMPTS = 5
_DIES_WITHIN_S = 0.5
_PORT_CLASH = "Failed to create server socket"


class _PortTakenError(Exception):
    """Somebody else listens on the port that this backend was given."""


class Backend(Owner):
    """Starts its processes when made, or takes up those that run; `view.pid` is the lending one's."""

    def __init__(
        self,
        launch: BackendLaunch,
        limits: Limits,
        ports: Ports,
        *,
        on_change: Callable[[Instance], None],
        on_gone: Callable[[Instance], None],
    ) -> None:
        wish = launch.wish
        self._launch, self._ports = launch, ports
        self._settled = asyncio.Event()
        self._endpoint: BackendEndpoint | None = None
        view = Instance(
            instance_id=launch.record.instance_id,
            pool_id=wish.pool_id,
            kind=InstanceKind.BACKEND,
            model="",
            state=InstanceState.STOPPED,
            shares=tuple(DeviceShare(device_id=name, layers=0, total_bytes=size) for name, size in wish.bytes.items()),
            started_unix_s=launch.record.started_unix_s,
        )
        # It does not wait after a death: it is its pool, and the model in it, that may be at fault.
        super().__init__(
            view,
            launch.record,
            launch.files,
            limits,
            launch.cgroup,
            on_change=on_change,
            on_gone=on_gone,
            wait_after=lambda _: 0.0,
        )

    async def endpoint(self) -> BackendEndpoint:
        """Return where its coordinator reaches it, as soon as it can.

        Raises:
            SollolError: Why it did not come up, or that it has ended since.
        """
        await self._settled.wait()
        if self._endpoint is None or self.view.state is not InstanceState.READY:
            stopped = Refusal(reason=Reason.STOPPED, message="the backend has ended", retry=Retry.RETRYABLE)
            raise SollolError(self.view.refusal or stopped)
        return self._endpoint

    def forwarder_status(self) -> Status | None:
        """What its forwarder says now: who is attached, and the bytes so far. None before it listens."""
        return read_status(self._launch.forwarder_files.status)

    def _announce(self, **changes: object) -> None:
        super()._announce(**changes)
        if self.view.state is not InstanceState.STARTING:
            self._settled.set()

    async def _serve_until_gone(self) -> Refusal | None:
        if self._launch.running:
            return await self._serve_again(self._launch.record.port)
        tried: set[int] = set()
        while len(tried) < _ATTEMPTS:
            port = self._ports.claim(besides=frozenset(tried))
            if port is None:
                break
            tried.add(port)
            try:
                return await self._serve_on(port)
            except _PortTakenError:
                log.info("backend_port_taken", port=port)
            finally:
                self._ports.give_back(port)
                self._clear(self._launch.files, self._launch.forwarder_files)
        return self._no_port()

    async def _serve_again(self, port: int) -> Refusal | None:
        self._ports.hold(port)
        try:
            return await self._serve_on(port)
        finally:
            self._ports.give_back(port)
            self._clear(self._launch.files, self._launch.forwarder_files)

    async def _serve_on(self, port: int) -> Refusal | None:
        launch = self._launch
        devices = launch.wish.device_ids
        argv = backend_argv(launch.program, host=LOOPBACK, port=port, devices=devices, threads=launch.threads)
        try:
            self._record = replace(self._record, port=port)
            process = launch.running.get(ENGINE) or spawn_server(argv, launch.environment, launch.files)
        except OSError as error:
            return cannot_run(argv[0], error)
        async with self._watched(ENGINE, process) as exited:
            self._announce(pid=process.pid)
            # One that serves already has been greeted, and must not be asked again.
            refusal = None if launch.running else await self._until_answers(process, exited, port)
            # One that was taken up has a forwarder, which must be seen gone.
            if launch.running or (refusal is None and not self._asked_to_stop.done()):
                refusal = await self._serve_behind_forwarder(process, exited, port)
            self._announce_stop()
            if not exited.done() and refusal is None:  # a failed one is killed
                await process.stop(exited, self._grace_s)
            return None if self.view.state is InstanceState.STOPPING else refusal

    async def _until_answers(self, process: EngineProcess, exited: Exited, port: int) -> Refusal | None:
        """Return None when it answers as it should, or shall stop.

        Raises:
            _PortTakenError: Try another one.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + self._limits.connect_timeout_s
        while not exited.done() and not self._asked_to_stop.done():
            if listens(process.pid, port):
                return await self._greeted(exited, port, until - loop.time())
            if loop.time() > until:
                return self._failed(Reason.ENGINE_STALLED, "does not listen in time")
            await self._next_event(exited, timeout_s=self._limits.poll_s)
        if self._asked_to_stop.done():
            return None
        if any(_PORT_CLASH in line for line in last_lines(self.files.log, KEPT_LINES)):
            raise _PortTakenError
        return self._ended_early(exited)

    def _ended_early(self, exited: Exited) -> Refusal:
        return self._failed(Reason.ENGINE_START_FAILED, f"ended before it answered ({ended(exited.result())})")

    async def _greeted(self, exited: Exited, port: int, within_s: float) -> Refusal | None:
        try:
            greeting = await greet(port, within_s=max(within_s, 1.0))
        except TimeoutError:
            return self._failed(Reason.ENGINE_STALLED, "listens and does not answer")
        except HandshakeFailedError as error:
            await self._next_event(exited, timeout_s=_DIES_WITHIN_S)  # its connections end before it does
            if exited.done():
                return self._ended_early(exited)
            return self._failed(Reason.ENGINE_START_FAILED, f"answers what we do not understand ({error})")
        if greeting.devices != len(self._launch.wish.device_ids):
            wanted = ", ".join(self._launch.wish.device_ids)
            return self._failed(Reason.ENGINE_START_FAILED, f"lends {greeting.devices} devices, not {wanted}")
        return None

    async def _serve_behind_forwarder(self, process: EngineProcess, exited: Exited, port: int) -> Refusal | None:
        launch = self._launch
        argv = forwarder_argv(launch, port, gone_after_s=self._limits.gone_after_s)
        try:
            forwarder = launch.running.get(FORWARDER) or spawn_server(
                argv, launch.environment, launch.forwarder_files, told=launch.wish.pool_secret
            )
        except OSError as error:
            return cannot_run(argv[0], error)
        async with self._watched(FORWARDER, forwarder) as forwarder_exited:
            refusal = await self._until_forwarded(exited, forwarder_exited)
            if refusal is None:
                looks = self._frozen(process.pid, port, forwarder.pid)
                refusal = await self._until_ended(looks, exited, forwarder_exited)
            if not forwarder_exited.done() and refusal is None:  # a frozen one would use up the grace
                await forwarder.stop(forwarder_exited, self._grace_s)
            return refusal

    async def _until_forwarded(self, exited: Exited, forwarder_exited: Exited) -> Refusal | None:
        """Return None when it is READY, or shall stop."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._limits.connect_timeout_s
        while not exited.done() and not forwarder_exited.done() and not self._asked_to_stop.done():
            status = self.forwarder_status()
            if status is not None:
                self._ready(status)
                return None
            if loop.time() > until:
                return self._failed(Reason.ENGINE_STALLED, "has a forwarder that does not listen in time")
            await self._next_event(exited, forwarder_exited, timeout_s=self._limits.poll_s)
        if self._asked_to_stop.done():
            return None
        if forwarder_exited.done() and forwarder_exited.result() == NO_FREE_PORT:
            return self._no_port()
        if forwarder_exited.done():
            lines = last_lines(self._launch.forwarder_files.log, 1)
            why = ended(forwarder_exited.result())
            return self._failed(Reason.ENGINE_START_FAILED, f"has no forwarder ({why}): {' '.join(lines)}")
        return self._died(exited)

    def _ready(self, status: Status) -> None:
        wish = self._launch.wish
        self._endpoint = endpoint_of(self._launch, status.port)
        self._announce(state=after(self.view.state, Event.HEALTHY), percent=self._percent(status))
        log.info("backend_ready", pool=wish.pool_id, port=status.port, devices=wish.device_ids)

    def _percent(self, status: Status) -> float:
        """How much of its weights has arrived, in whole percents: heads are told of each."""
        expected = self._launch.wish.upload_bytes
        return min(100.0, 100 * status.up_bytes // expected) if expected else 100.0

    def _count(self) -> None:
        """Tell how far the upload is. What comes after it (prompts, tokens) is of no interest here."""
        status = self.forwarder_status() if self.view.percent < 100 else None
        if status is not None and (percent := self._percent(status)) > self.view.percent:
            self._announce(percent=percent)

    def _frozen(self, pid: int, port: int, forwarder_pid: int) -> Iterator[str]:
        """Yield, at every look, what is wrong with the backend or its forwarder; empty when nothing is."""
        clock = asyncio.get_running_loop().time
        backend = FreezeWatch(computes_here=self._launch.wish.device_ids == (CPU,))
        forwarder = FreezeWatch(computes_here=False)
        while True:
            wrong = backend.sees(look_at(pid, port), clock())
            stopped = forwarder.sees(look_at(forwarder_pid), clock())
            yield wrong or (stopped and f"has a forwarder that {stopped}")

    async def _until_ended(self, looks: Iterator[str], exited: Exited, forwarder_exited: Exited) -> Refusal | None:
        """Return None when it shall stop, or its forwarder had nobody left to serve."""
        while not (exited.done() or forwarder_exited.done() or self._asked_to_stop.done()):
            await self._next_event(exited, forwarder_exited, timeout_s=self._limits.freeze_poll_s)
            if wrong := next(looks):
                return self._failed(Reason.ENGINE_STALLED, wrong)
            if (user := stranger_at(self.view.pid, self._record.port)) is not None:
                what = f"was ended: user {user} of that machine is connected to it past its forwarder"
                return self._failed(Reason.ENGINE_DIED, what, user=user)
            self._count()
            keep_short(self.files.log, self._limits.most_log_bytes)
        if self._asked_to_stop.done():
            return None
        if exited.done():
            return self._died(exited)
        status = self.forwarder_status()
        why, exit_code = status.ended if status else "", forwarder_exited.result()
        if exit_code or (exit_code is None and not why):
            what = f"lost its forwarder ({ended(exit_code)}), and with it its coordinator"
            return self._failed(Reason.ENGINE_DIED, what)
        log.info("backend_unused", pool=self._launch.wish.pool_id, why=why)
        self._announce(state=after(self.view.state, Event.STOP))
        return None

    def _died(self, exited: Exited) -> Refusal:
        if (limit_bytes := self._launch.cgroup.out_of_memory()) is not None:
            return self._failed(Reason.OUT_OF_MEMORY, killed_for_memory(limit_bytes), limit_bytes=limit_bytes)
        exit_code = exited.result()
        numbers = {} if exit_code is None else {"exit_code": exit_code}
        return self._failed(Reason.ENGINE_DIED, f"ended ({ended(exit_code)})", **numbers)

    def _no_port(self) -> Refusal:
        ports = self._launch.site.ports
        message = f"ports {ports.start} to {ports.stop - 1} are all taken; set rpc_ports to others"
        return Refusal(reason=Reason.PORT_TAKEN, message=message, retry=Retry.RETRYABLE)

    def _failed(self, reason: Reason, what: str, **numbers: int) -> Refusal:
        return self._lost(
            Refusal(
                reason=reason,
                message=f"the backend on {self._launch.site.node_id} {what}; see its log",
                retry=Retry.RETRYABLE,
                numbers=numbers,
                log_lines=last_lines(self.files.log, KEPT_LINES),
            )
        )
