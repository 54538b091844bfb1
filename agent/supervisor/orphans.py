"""Processes that nobody can account for: left alone for a while, so that a person can look at them, then ended."""

import asyncio
import contextlib
from collections.abc import Iterable

import structlog

from agent.supervisor import adoption
from agent.supervisor.files import Directories
from agent.supervisor.process import EngineProcess
from agent.supervisor.records import Record

log = structlog.get_logger(__name__)


class Orphan:
    """One or more processes that were found together.

    Args:
        name: The instance's id; a pid for what was found by its mark alone.
        record: None for the latter.
    """

    def __init__(self, name: str, processes: Iterable[EngineProcess], record: Record | None = None) -> None:
        self.name, self.record = name, record
        # Watched from now on: an ended one's pid may soon be somebody else's.
        self._exits = {process: asyncio.create_task(process.wait()) for process in processes}

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._exits]

    async def end(self, grace_s: float) -> None:
        """Ask the processes to end, end those that do not, and return when they are gone."""
        await asyncio.gather(*(process.stop(exited, grace_s) for process, exited in self._exits.items()))
        log.warning("orphan_ended", name=self.name, pids=self.pids)
        await self.let_go()

    async def let_go(self) -> None:
        for process, exited in self._exits.items():
            exited.cancel()
            await asyncio.wait({exited})
            process.let_go()


class Orphans:
    """Owner of those that were found.

    Args:
        ttl_s: From the first `add` until all are ended.
        grace_s: From TERM to KILL.
    """

    def __init__(self, directories: Directories, *, ttl_s: float, grace_s: float) -> None:
        self._directories, self._ttl_s, self._grace_s = directories, ttl_s, grace_s
        self._all: list[Orphan] = []
        self._ending: dict[asyncio.Task[None], Orphan] = {}
        self._task: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    def add(self, orphan: Orphan, why: str, *, at_once: bool = False) -> None:
        """Take one over; `at_once` for what we know and nobody can use: it would only hold memory."""
        ended_in_s = 0.0 if at_once else self._ttl_s
        log.warning("orphan_found", name=orphan.name, why=why, pids=orphan.pids, ended_in_s=ended_in_s)
        if at_once:
            ending = end_all((orphan,), self._directories, self._grace_s)
            task = asyncio.create_task(ending, name=f"end {orphan.name}")
            self._ending[task] = orphan
            task.add_done_callback(self._ending.pop)
            return
        self._all.append(orphan)
        if self._task is None:
            self._task = asyncio.create_task(self._reap(), name="reap orphans")

    def has(self, name: str) -> bool:
        return any(each.name == name for each in (*self._all, *self._ending.values()))

    async def _reap(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._ttl_s):
                await self._closing.wait()
                return
        await self._end()

    async def close(self, *, leave: bool) -> None:
        """End them, or leave them to the next agent. Those that are being ended are waited for, and ended once."""
        self._closing.set()
        if self._task is not None:
            await asyncio.wait({self._task})
        await asyncio.gather(*self._ending)
        if not leave:
            await self._end()
        await asyncio.gather(*(each.let_go() for each in self._all))

    async def _end(self) -> None:
        await end_all(self._all, self._directories, self._grace_s)
        self._all.clear()


async def end_all(orphans: Iterable[Orphan], directories: Directories, grace_s: float) -> None:
    """Return when all are gone, and their files too."""
    await asyncio.gather(*(each.end(grace_s) for each in orphans))
    for each in orphans:
        if each.record is not None:
            adoption.forget(each.record, directories)


async def end_everything(directories: Directories, *, grace_s: float) -> int:
    """End all that the records name or that carries our mark; returns how many instances that were.

    Call it with no agent on these directories.
    """
    found = list(adoption.found_in(directories))
    known = {process.pid for each in found for process in each.running.values()}
    orphans = [Orphan(each.record.instance_id, each.running.values(), each.record) for each in found]
    strangers = adoption.unrecorded(directories, known)
    orphans += [Orphan(str(pid), (process,)) for pid, process in strangers.items()]
    await end_all(orphans, directories, grace_s)
    return len(orphans)
