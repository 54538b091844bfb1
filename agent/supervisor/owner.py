"""What all supervised instances have in common: one task that owns each until it is gone, and its record."""

import abc
import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import structlog
from sollol.errors import Reason, Refusal, Retry
from sollol.report import Instance, InstanceState

from agent.supervisor import records
from agent.supervisor.cgroups import EngineCgroup
from agent.supervisor.files import InstanceFiles
from agent.supervisor.process import EngineProcess
from agent.supervisor.records import ENGINE, Record
from agent.supervisor.state import LIVE, Event, after

log = structlog.get_logger(__name__)


Exited = asyncio.Task[int | None]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """`start_timeout_s` is without any load progress, `stop_grace_s` from TERM to KILL.

    `connect_timeout_s` bounds the first sign of life of what can hang without a word: a backend, and a coordinator that
    connects to backends. `gone_after_s` is how long a backend outlives its coordinator, `freeze_poll_s` how often what
    no exit tells is looked for: a process that is stopped or hangs, a coordinator that has lost a backend.
    `orphan_ttl_s` is how long what nobody can account for is left alone. `most_log_bytes` is how long the log of one
    that serves gets before it is started anew.
    """

    start_timeout_s: float = 600.0
    stop_grace_s: float = 5.0
    poll_s: float = 0.05
    connect_timeout_s: float = 20.0
    gone_after_s: float = 10.0
    freeze_poll_s: float = 1.0
    orphan_ttl_s: float = 120.0
    most_log_bytes: int = 64 << 20


class Owner(abc.ABC):
    """Starts its instance when made. `view` is its state for everybody; only its own task changes it.

    Args:
        record: What the next agent needs to know of it; kept in its state file while it has processes.
        cgroup: The engine's.
        on_change: Called with every new view.
        on_gone: Called once, when no process is left and before anybody is told: gives the reservation back.
        wait_after: Called with the final view of one that ended unasked; the seconds its model must wait here.
    """

    def __init__(
        self,
        view: Instance,
        record: Record,
        files: InstanceFiles,
        limits: Limits,
        cgroup: EngineCgroup,
        *,
        on_change: Callable[[Instance], None],
        on_gone: Callable[[Instance], None],
        wait_after: Callable[[Instance], float],
    ) -> None:
        self.files = files
        self.ended_s: float | None = None
        self.view = view
        self._record, self._cgroup, self._leaving = record, cgroup, False
        self._limits, self._grace_s = limits, limits.stop_grace_s
        self._on_change, self._on_gone, self._wait_after = on_change, on_gone, wait_after
        self._asked_to_stop: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._gone = asyncio.Event()
        self._processes: set[EngineProcess] = set()
        self._announce(state=after(self.view.state, Event.START))
        self._task = asyncio.create_task(self._run(), name=f"owner of {view.instance_id}")

    @abc.abstractmethod
    async def _serve_until_gone(self) -> Refusal | None:
        """Run the instance through its whole life. Returns why it ended, None when that was as it should be."""

    async def stop(self, *, at_once: bool = False) -> None:
        """Return when no process is left: at once when none is, and together with any other stop.

        Args:
            at_once: It is known to hang: do not wait for it to end by itself, nor let another stop go on waiting.
        """
        if not self._asked_to_stop.done():
            self._asked_to_stop.set_result(None)
        if at_once:
            self._grace_s = 0.0
            for process in self._processes:
                process.kill()
        await self._gone.wait()

    async def leave(self) -> None:
        """End the owner and nothing else: its processes run on, and its record tells the next agent of them."""
        self._leaving = True
        await self.close()

    async def close(self) -> None:
        """End the owner too, by force if need be. Call `stop` first."""
        self._task.cancel()
        await asyncio.wait({self._task})

    def dismiss(self) -> None:
        """Stop waiting for the end of a back-off: nobody will look at this record again."""
        self._task.cancel()

    @property
    def is_live(self) -> bool:
        return self.view.state in LIVE

    @property
    def shall_stop(self) -> bool:
        """Somebody has asked; its state shows it only when its own task has heard of it."""
        return self._asked_to_stop.done()

    async def _run(self) -> None:
        try:
            refusal = await self._serve_until_gone()
        except Exception as error:
            # The owner is the last to know: whoever waits for this instance must get an answer from somebody.
            log.exception("instance_owner_failed", instance=self.view.instance_id)
            refusal = Refusal(reason=Reason.INTERNAL, message=f"the agent failed to supervise this engine: {error!r}")
        self._settle(refusal)
        if self.view.state is InstanceState.FAILED:
            await self._back_off(self._wait_after(self.view))

    @asynccontextmanager
    async def _watched(self, role: str, process: EngineProcess) -> AsyncIterator[Exited]:
        """Write a process down and watch for its exit. When the block is left it is gone, or left to the next agent.

        However long that takes: its memory is its own until then.
        """
        if (identity := process.identity()) is not None:  # else it has ended already: its owner will say so
            if role == ENGINE and self._record.processes.get(ENGINE) == identity:  # an earlier agent has started it
                self._cgroup.take_over()
            elif role == ENGINE:
                process.end_first()
                self._cgroup.take_in(process.pid)
            self._note(processes={**self._record.processes, role: identity})
        exited = asyncio.create_task(process.wait(), name=f"exit of {process.pid}")
        self._processes.add(process)
        try:
            yield exited
        finally:
            try:
                if not self._leaving:
                    process.kill()
                    await asyncio.wait({exited})
                    if role == ENGINE:
                        await self._cgroup.remove()
            except asyncio.CancelledError:  # the agent itself ends and has waited long enough
                self._leaving = True
                raise
            finally:
                exited.cancel()
                await asyncio.wait({exited})
                self._processes.discard(process)
                process.let_go()

    def _note(self, **changes: object) -> None:
        self._record = msgspec.structs.replace(self._record, **changes)
        records.write(self.files.state, self._record)

    def _clear(self, *files: InstanceFiles) -> None:
        """Nothing runs any more that needs these files, unless it is left to the next agent."""
        if not self._leaving:
            for each in files:
                each.remove_run_files()
                each.state.unlink(missing_ok=True)

    def _announce_stop(self) -> None:
        """Tell that it is ending, if somebody asked for that: its end is no death."""
        if self._asked_to_stop.done():
            self._announce(state=after(self.view.state, Event.STOP))

    def _lost(self, why: Refusal) -> Refusal:
        """Tell that it serves nobody any more, while what is left of it is being ended."""
        self._announce(state=after(self.view.state, Event.UNHEALTHY), refusal=why)
        return why

    async def _next_event(self, *exits: Exited, timeout_s: float | None = None) -> None:
        events: tuple[asyncio.Future[Any], ...] = (*exits, self._asked_to_stop)
        await asyncio.wait(events, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)

    def _settle(self, refusal: Refusal | None) -> None:
        view = self.view
        state = after(view.state, Event.EXITED)
        self.ended_s = asyncio.get_running_loop().time()
        self.view = msgspec.structs.replace(view, state=state, pid=0, refusal=refusal)
        if refusal is not None:
            kind, reason, message = view.kind.value, refusal.reason, refusal.message
            log.warning("instance_failed", kind=kind, model=view.model, reason=reason, message=message)
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

    def _announce(self, **changes: object) -> None:
        self.view = msgspec.structs.replace(self.view, **changes)
        if self.view.state is InstanceState.READY and self._record.state is not InstanceState.READY:
            self._note(state=InstanceState.READY)
        self._on_change(self.view)


def cannot_run(program: str, error: OSError) -> Refusal:
    """Say why a process of an engine's, or beside one, could not even be started."""
    if error.filename == program:
        message = f"cannot run {program}: {error.strerror}; set `engine` to a llama-server"
        return Refusal(reason=Reason.ENGINE_MISSING, message=message, retry=Retry.RETRYABLE)
    message = f"cannot start an engine: {error}; see that the agent's directories can be written and are not full"
    return Refusal(reason=Reason.ENGINE_START_FAILED, message=message, retry=Retry.RETRYABLE)
