"""One coordinator and its only owner: a task that starts the process, watches it and sees it gone."""

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import structlog
from sollol.errors import Reason, Refusal, Retry
from sollol.report import CoordinatorPlan, Instance, InstanceState

from agent.supervisor import leftovers
from agent.supervisor.failure import KEPT_LINES, classify, stalled
from agent.supervisor.files import InstanceFiles, last_lines
from agent.supervisor.health import serves
from agent.supervisor.process import EngineProcess, bytes_read, spawn
from agent.supervisor.progress import newest_percent
from agent.supervisor.state import LIVE, Event, after

log = structlog.get_logger(__name__)

_READ_BYTES = 64 * 1024


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """`start_timeout_s` is without any load progress, `stop_grace_s` from TERM to KILL."""

    start_timeout_s: float = 600.0
    stop_grace_s: float = 5.0
    poll_s: float = 0.05


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """Everything to start one process."""

    instance_id: str
    plan: CoordinatorPlan
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    files: InstanceFiles


class Coordinator:
    """Starts its process when made. `view` is its state for everybody; only its own task changes it.

    Args:
        on_change: Called with every new view.
        on_gone: Called once, when no process is left and before anybody is told: gives the reservation back.
        wait_after: Called with the final view of one that ended unasked; the seconds its model must wait here.
    """

    def __init__(
        self,
        launch: Launch,
        limits: Limits,
        *,
        on_change: Callable[[Instance], None],
        on_gone: Callable[[Instance], None],
        wait_after: Callable[[Instance], float],
    ) -> None:
        self.files = launch.files
        self.ended_s: float | None = None
        self.view = Instance(
            instance_id=launch.instance_id,
            model=launch.plan.model,
            state=InstanceState.STOPPED,
            parallel=launch.plan.parallel,
            context_per_slot=launch.plan.context_per_slot,
            shares=launch.plan.shares,
            started_unix_s=time.time(),
        )
        self._launch = launch
        self._limits = limits
        self._on_change, self._on_gone, self._wait_after = on_change, on_gone, wait_after
        self._asked_to_stop: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._gone = asyncio.Event()
        self._announce(state=after(self.view.state, Event.START))
        self._task = asyncio.create_task(self._run(), name=f"coordinator {launch.instance_id}")

    async def stop(self) -> None:
        """Return when the process is gone: at once when it already is, and together with any other stop."""
        if not self._asked_to_stop.done():
            self._asked_to_stop.set_result(None)
        await self._gone.wait()

    async def close(self) -> None:
        """End the owner too, by force if need be. Call `stop` first."""
        self._task.cancel()
        await asyncio.wait({self._task})

    def dismiss(self) -> None:
        """Stop waiting for the end of a back-off: nobody will look at this record again."""
        self._task.cancel()

    async def _run(self) -> None:
        try:
            refusal = await self._serve_until_gone()
        except Exception as error:
            # The owner is the last to know: whoever waits for this instance must get an answer from somebody.
            log.exception("coordinator_owner_failed", instance=self.view.instance_id)
            refusal = Refusal(reason=Reason.INTERNAL, message=f"the agent failed to supervise this engine: {error!r}")
        self._settle(refusal)
        if self.view.state is InstanceState.FAILED:
            await self._back_off(self._wait_after(self.view))

    async def _serve_until_gone(self) -> Refusal | None:
        """Run the process through its whole life. Returns why it ended, None when it was asked to."""
        try:
            process = await spawn(self._launch.argv, self._launch.environment, self.files)
        except OSError as error:
            return _cannot_run(self._launch.argv[0], error)
        exited = asyncio.create_task(process.wait(), name=f"exit of {process.pid}")
        try:
            leftovers.remember(self.view.instance_id, process.pid, self.files)
            self._announce(pid=process.pid)
            refusal = await self._until_ready(process, exited)
            if refusal is None:
                await self._next_event(exited)
            if self._asked_to_stop.done():
                self._announce(state=after(self.view.state, Event.STOP))
            if not exited.done():
                await process.stop(exited, self._limits.stop_grace_s)
            return self._why(exited.result(), refusal)
        finally:
            process.kill()
            await asyncio.wait({exited}, timeout=self._limits.stop_grace_s)
            exited.cancel()
            self.files.remove_run_files()
            self.files.state.unlink(missing_ok=True)

    async def _until_ready(self, process: EngineProcess, exited: asyncio.Task[int]) -> Refusal | None:
        """Return None when it serves, ended or shall stop; a refusal when nothing moved for the whole start limit."""
        clock = asyncio.get_running_loop().time
        began = moved = clock()
        signs = _SignsOfLoading(self.files.progress, process.pid)
        while not exited.done() and not self._asked_to_stop.done():
            if await serves(self.files.socket):
                self._announce(state=after(self.view.state, Event.HEALTHY), percent=100.0)
                log.info("coordinator_ready", model=self.view.model, took_s=round(clock() - began, 3))
                return None
            if signs.moved():
                moved = clock()
                self._announce_percent(signs.percent)
            elif clock() - moved > self._limits.start_timeout_s:
                self._announce(state=after(self.view.state, Event.UNHEALTHY))
                return stalled(self.view.model, clock() - moved, last_lines(self.files.log, KEPT_LINES))
            await self._next_event(exited, timeout_s=self._limits.poll_s)
        return None

    async def _next_event(self, exited: asyncio.Task[int], timeout_s: float | None = None) -> None:
        events: tuple[asyncio.Future[Any], ...] = (exited, self._asked_to_stop)
        await asyncio.wait(events, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)

    def _why(self, exit_code: int, known: Refusal | None) -> Refusal | None:
        if self.view.state is InstanceState.STOPPING or known is not None:
            return known
        tail = last_lines(self.files.log, 2 * KEPT_LINES)
        was_ready = self.view.state is InstanceState.READY
        return classify(exit_code, tail, was_ready=was_ready, model=self.view.model)

    def _settle(self, refusal: Refusal | None) -> None:
        state = after(self.view.state, Event.EXITED)
        self.ended_s = asyncio.get_running_loop().time()
        self.view = msgspec.structs.replace(self.view, state=state, pid=0, refusal=refusal)
        if refusal is not None:
            log.warning("coordinator_failed", model=self.view.model, reason=refusal.reason, message=refusal.message)
        try:
            self._on_gone(self.view)
        finally:
            self._gone.set()
            self._announce()

    async def _back_off(self, wait_s: float) -> None:
        if wait_s <= 0:
            return
        self._announce(state=after(self.view.state, Event.BACK_OFF))
        await asyncio.sleep(wait_s)
        self._announce(state=after(self.view.state, Event.RETRY_DUE))

    def _announce_percent(self, percent: float) -> None:
        """Tell of whole percents only: watchers get at most a hundred of them."""
        if int(percent) > int(self.view.percent):
            self._announce(percent=min(percent, 99.0))

    def _announce(self, **changes: object) -> None:
        self.view = msgspec.structs.replace(self.view, **changes)
        self._on_change(self.view)

    @property
    def is_live(self) -> bool:
        return self.view.state in LIVE


def _cannot_run(program: str, error: OSError) -> Refusal:
    if error.filename == program:
        message = f"cannot run {program}: {error.strerror}; set `engine` to a llama-server"
        return Refusal(reason=Reason.ENGINE_MISSING, message=message, retry=Retry.RETRYABLE)
    message = f"cannot start an engine: {error}; see that the agent's directories can be written and are not full"
    return Refusal(reason=Reason.ENGINE_START_FAILED, message=message, retry=Retry.RETRYABLE)


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
