"""What every owner promises: an instance is gone when its processes are, and not before."""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from sollol.errors import Reason, Refusal
from sollol.report import Instance, InstanceKind, InstanceState

from agent.supervisor.cgroups import EngineCgroup
from agent.supervisor.files import files_of
from agent.supervisor.owner import Limits, Owner
from agent.supervisor.process import EngineProcess, spawn_server
from agent.supervisor.records import ENGINE, Record
from tests.fakes.fake_engine import fake_engine
from tests.supervised import directories, plan_of, runs, started, supervising
from tests.waiting import wait_until

STALLED = Refusal(reason=Reason.ENGINE_STALLED, message="it hangs")


class Failing(Owner):
    """Owns one process that it finds wrong at once."""

    def __init__(self, tmp_path: Path, on_gone: Callable[[Instance], None]) -> None:
        where = directories(tmp_path)
        where.create()
        files = files_of("p", where)
        self.process = spawn_server(("sleep", "600"), {"PATH": os.environ["PATH"]}, files)
        record = Record(
            instance_id="p", pool_id="p", kind=InstanceKind.BACKEND, reserved={}, socket="", started_unix_s=0
        )
        super().__init__(
            Instance(instance_id="p", model="", state=InstanceState.STOPPED),
            record,
            files,
            Limits(stop_grace_s=0.05),
            EngineCgroup(),
            on_change=lambda _: None,
            on_gone=on_gone,
            wait_after=lambda _: 0.0,
        )

    async def _serve_until_gone(self) -> Refusal | None:
        try:
            async with self._watched(ENGINE, self.process):
                return self._lost(STALLED)
        finally:
            self._clear(self.files)

    async def is_done_within(self, seconds: float) -> bool:
        done, _ = await asyncio.wait({self._task}, timeout=seconds)
        return bool(done)


@pytest.fixture
def stuck_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits in the kernel, for a driver or a disk, is not ended by a kill before that lets go of it."""
    monkeypatch.setattr(EngineProcess, "kill", lambda _: None)


@pytest.mark.usefixtures("stuck_kernel")
async def test_what_a_kill_does_not_end_at_once_keeps_its_bytes_and_its_record_until_it_is_gone(tmp_path: Path) -> None:
    gone: list[tuple[InstanceState, bool]] = []
    owner = Failing(tmp_path, lambda view: gone.append((view.state, Path(f"/proc/{owner.process.pid}").exists())))
    assert not await owner.is_done_within(0.5)
    assert (gone, owner.view.state, owner.view.refusal) == ([], InstanceState.LOST, STALLED)
    assert owner.files.state.exists()
    os.kill(owner.process.pid, signal.SIGKILL)
    assert await owner.is_done_within(10)
    assert gone == [(InstanceState.FAILED, False)], "it is reaped, too"
    assert not owner.files.state.exists()


@pytest.mark.usefixtures("stuck_kernel")
async def test_an_agent_that_ends_meanwhile_leaves_it_to_the_next_one(tmp_path: Path) -> None:
    gone: list[Instance] = []
    owner = Failing(tmp_path, gone.append)
    await wait_until(lambda: owner.view.state is InstanceState.LOST, what="it was found wrong")
    await asyncio.wait_for(owner.close(), 10)
    assert (gone, owner.files.state.exists()) == ([], True)
    os.kill(owner.process.pid, signal.SIGKILL)
    os.waitpid(owner.process.pid, 0)


async def test_a_stop_at_once_does_not_wait_for_a_gentle_one_that_came_before(tmp_path: Path) -> None:
    async with supervising(tmp_path, fake_engine("ignore_term=1"), limits=Limits(stop_grace_s=600)) as supervisor:
        pid = (await started(supervisor, "p", plan_of("m"))).pid
        gentle = asyncio.create_task(supervisor.stop("p"))
        await wait_until(lambda: supervisor.instances()[0].state is InstanceState.STOPPING, what="it is stopping")
        await asyncio.wait_for(supervisor.stop("p", at_once=True), 20)
        await gentle
        assert not runs(pid)
        assert supervisor.instances() == ()
