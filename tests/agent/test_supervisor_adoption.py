"""What an agent left running, however it ended, the next one takes up: that, and nothing else."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from sollol import kept
from sollol.errors import Reason, SollolError, refuse
from sollol.report import InstanceKind, InstanceState
from structlog.testing import capture_logs

from agent.supervisor import records
from agent.supervisor.adoption import problem_of
from agent.supervisor.endpoints import TcpSite
from agent.supervisor.files import files_of
from agent.supervisor.freeze import look_at
from agent.supervisor.identity import Identity, boot_id, identity_of, is_running, started_ticks
from agent.supervisor.lending import forwarder_id
from agent.supervisor.orphans import Orphan, Orphans, end_everything
from agent.supervisor.records import ENGINE, FORWARDER, Record
from agent.supervisor.supervisor import Supervisor
from agent.supervisor.tunnelling import tunnel_id
from tests.fakes.fake_engine import fake_engine
from tests.supervised import (
    QUICK,
    Promised,
    directories,
    plan_of,
    record_of,
    runs,
    settled,
    started,
    supervising,
)
from tests.waiting import wait_until

SOON = msgspec.structs.replace(QUICK, orphan_ttl_s=0.3)


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        yield process
        process.kill()


def pid_of(supervisor: Supervisor, instance_id: str) -> int:
    """0 when it does not run."""
    (instance,) = (each for each in supervisor.instances() if each.instance_id == instance_id)
    return instance.pid


async def leave_one(tmp_path: Path, *knobs: str, ready: bool = True, **options: object) -> int:
    """An agent starts pool p and ends in order, leaving it; returns the pid."""
    async with supervising(tmp_path, fake_engine(*knobs), **options) as supervisor:
        if ready:
            await started(supervisor, "p", plan_of("m"))
        else:
            await supervisor.start("p", plan_of("m"))
            await wait_until(lambda: supervisor.instances()[0].percent > 0, what="it loads")
        pid = pid_of(supervisor, "p")
        await supervisor.close(leave=True)
    assert runs(pid)
    return pid


def write_record(tmp_path: Path, identity: Identity) -> Path:
    where = directories(tmp_path)
    where.create()
    files = files_of("p", where)
    record = Record(
        instance_id="p",
        pool_id="p",
        kind=InstanceKind.COORDINATOR,
        reserved={"CPU": 1},
        socket=str(files.socket),
        started_unix_s=0,
        processes={ENGINE: identity},
    )
    records.write(files.state, record)
    return files.state


def identity(pid: int, **changes: object) -> Identity:
    found = identity_of(pid)
    assert found is not None
    return msgspec.structs.replace(found, **changes)


def nothing_is_left(tmp_path: Path) -> bool:
    return not [*(tmp_path / "run").iterdir(), *(tmp_path / "state" / "instances").iterdir()]


async def test_a_running_engine_is_written_down_for_its_owner_s_eyes_only(tmp_path: Path) -> None:
    async with supervising(tmp_path, fake_engine()) as supervisor:
        pid = (await started(supervisor, "p", plan_of("m"))).pid
        path = files_of("p", directories(tmp_path)).state
        record = record_of(tmp_path, "p")
        assert path.stat().st_mode & 0o777 == 0o600
    assert record.processes == {
        ENGINE: Identity(pid=pid, started_ticks=record.processes[ENGINE].started_ticks, boot_id=boot_id())
    }
    assert (record.state, record.reserved, record.plan) == (InstanceState.READY, {"CPU": 1 << 20}, plan_of("m"))
    assert not path.exists()


async def test_the_next_agent_takes_up_what_a_crashed_one_left(tmp_path: Path) -> None:
    """The crashed agent is a process of its own, killed while it supervises."""
    agent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CRASHING_AGENT, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert agent.stdout is not None
    pid = int(await asyncio.wait_for(agent.stdout.readline(), 20))
    agent.kill()
    await agent.wait()
    assert runs(pid), "an agent's death must not end its engines"
    promises = Promised()
    async with supervising(tmp_path, fake_engine(), promises=promises) as supervisor:
        assert supervisor.adopt() == 1
        (instance,) = supervisor.instances()
        assert (instance.state, instance.percent, instance.model) == (InstanceState.READY, 100.0, "m")
        assert promises.restored == [("p", {"CPU": 1 << 20})]
        assert supervisor.socket_of("p").exists()
        await wait_until(lambda: pid_of(supervisor, "p") == pid, what="the same process")
        assert (await supervisor.start("p", plan_of("m"))).pid == pid, "a repeated start is the one that serves"
        await supervisor.stop("p")
        assert not runs(pid)
        assert promises.gone == ["p"]
    assert nothing_is_left(tmp_path)


CRASHING_AGENT = """
import asyncio, sys
from pathlib import Path
import structlog
from tests.fakes.fake_engine import fake_engine
from tests.supervised import plan_of, started, supervising

structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))

async def main():
    async with supervising(Path(sys.argv[1]), fake_engine()) as supervisor:
        print((await started(supervisor, "p", plan_of("m"))).pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_load_goes_on_under_the_next_agent(tmp_path: Path) -> None:
    pid = await leave_one(tmp_path, "load_s=6", ready=False)
    async with supervising(tmp_path, fake_engine()) as supervisor:
        supervisor.adopt()
        changes = [instance async for instance in supervisor.watch("p")]
    assert changes[0].state is InstanceState.STARTING
    assert (changes[-1].state, changes[-1].pid) == (InstanceState.READY, pid)
    assert any(0 < each.percent < 100 for each in changes)


async def test_a_load_that_ended_meanwhile_is_found_ready(tmp_path: Path) -> None:
    pid = await leave_one(tmp_path, "load_s=0.3", ready=False)
    async with supervising(tmp_path, fake_engine()) as supervisor:
        supervisor.adopt()
        last = await settled(supervisor, "p")
        assert (last.state, last.pid) == (InstanceState.READY, pid)


async def test_an_engine_ends_in_order_though_another_agent_started_it(tmp_path: Path) -> None:
    """A served one wants a line on the standard input that its first agent gave it."""
    pid = await leave_one(tmp_path)
    with capture_logs() as logs:
        async with supervising(tmp_path, fake_engine()) as supervisor:
            supervisor.adopt()
            await supervisor.stop("p")
            assert not runs(pid)
    assert not [each for each in logs if each["event"] == "engine_killed"]


async def test_the_death_of_one_that_was_taken_up_is_seen_and_told_from_its_log(tmp_path: Path) -> None:
    pid = await leave_one(tmp_path)
    async with supervising(tmp_path, fake_engine()) as supervisor:
        supervisor.adopt()
        await wait_until(lambda: pid_of(supervisor, "p"), what="it is watched")
        os.kill(pid, signal.SIGKILL)
        await wait_until(lambda: supervisor.failure_of("p"), within_s=1, what="its death is seen")
        refusal = supervisor.failure_of("p")
    assert refusal is not None
    assert (refusal.reason, refusal.numbers) == (Reason.ENGINE_DIED, {})
    assert "an earlier agent had started it" in refusal.message
    assert any("listening" in line for line in refusal.log_lines)


async def test_engines_can_be_left_again_and_again(tmp_path: Path) -> None:
    pid = await leave_one(tmp_path)
    for _ in range(2):
        async with supervising(tmp_path, fake_engine()) as supervisor:
            assert supervisor.adopt() == 1
            await supervisor.close(leave=True)
    async with supervising(tmp_path, fake_engine()) as supervisor:
        assert supervisor.adopt() == 1
        await wait_until(lambda: pid_of(supervisor, "p") == pid, what="the same process")


async def test_one_that_is_just_stopping_is_not_left(tmp_path: Path) -> None:
    async with supervising(tmp_path, fake_engine("ignore_term=1")) as supervisor:
        pid = (await started(supervisor, "p", plan_of("m"))).pid
        stopping = asyncio.create_task(supervisor.stop("p"))
        await wait_until(lambda: supervisor.instances()[0].state is InstanceState.STOPPING, what="it is stopping")
        await supervisor.close(leave=True)
        assert not runs(pid)
        await stopping


async def test_one_that_was_asked_to_stop_a_moment_ago_is_not_left_either(tmp_path: Path) -> None:
    async with supervising(tmp_path, fake_engine()) as supervisor:
        pid = (await started(supervisor, "p", plan_of("m"))).pid
        async with asyncio.timeout(10):  # who asked would wait for ever for one that was left
            await asyncio.gather(supervisor.stop("p"), supervisor.close(leave=True))
        assert not runs(pid)


@pytest.mark.parametrize("changes", [{"started_ticks": 1}, {"boot_id": "another boot"}])
async def test_a_stranger_with_the_same_pid_is_left_alone(
    tmp_path: Path, stranger: subprocess.Popen[bytes], changes: dict[str, object]
) -> None:
    path = write_record(tmp_path, identity(stranger.pid, **changes))
    async with supervising(tmp_path, fake_engine()) as supervisor:
        assert supervisor.adopt() == 0
        assert supervisor.instances() == ()
        assert not path.exists()
    assert await end_everything(directories(tmp_path), grace_s=0) == 0
    assert stranger.poll() is None


async def test_one_that_has_ended_meanwhile_is_forgotten(tmp_path: Path) -> None:
    pid = await leave_one(tmp_path)
    os.killpg(pid, signal.SIGKILL)
    await wait_until(lambda: not runs(pid), what="it has ended")
    async with supervising(tmp_path, fake_engine()) as supervisor:
        assert supervisor.adopt() == 0
        assert nothing_is_left(tmp_path)
        await started(supervisor, "p", plan_of("m"))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def of_another_version(path: Path) -> None:
    record = kept.load(path, Record, version=records.VERSION)
    kept.save(path, record, version=records.VERSION + 1)


@pytest.mark.parametrize("damage", [truncated, of_another_version, lambda path: path.write_bytes(b"\xff" * 100)])
async def test_a_damaged_record_is_put_aside_and_its_engine_ended_after_a_stated_time(tmp_path: Path, damage) -> None:
    pid = await leave_one(tmp_path)
    damage(files_of("p", directories(tmp_path)).state)
    with capture_logs() as logs:
        async with supervising(tmp_path, fake_engine(), limits=SOON) as supervisor:
            assert supervisor.adopt() == 0
            assert runs(pid)
            await started(supervisor, "q", plan_of("m"))
            await wait_until(lambda: not runs(pid), what="it is ended")
    (aside,) = (tmp_path / "state" / "instances").iterdir()
    assert aside.name.startswith("p.json.bad-")
    told = [(each["event"], each["pids"]) for each in logs if each["event"].startswith("orphan")]
    assert told == [("orphan_found", [pid]), ("orphan_ended", [pid])]


async def test_an_orphan_that_is_being_ended_when_the_agent_ends_is_waited_for_and_ended_once(tmp_path: Path) -> None:
    class Slow(Orphan):
        ends, gone = 0, asyncio.Event()

        async def end(self, grace_s: float) -> None:
            self.ends += 1
            await self.gone.wait()

    slow = Slow("p", ())
    orphans = Orphans(directories(tmp_path), ttl_s=0, grace_s=0)
    orphans.add(slow, "nobody knows")
    await wait_until(lambda: slow.ends, what="its time is over")
    closing = asyncio.create_task(orphans.close(leave=False))
    await asyncio.wait({closing}, timeout=0.1)
    assert not closing.done()
    slow.gone.set()
    await closing
    assert slow.ends == 1


@pytest.mark.parametrize(
    "options",
    [
        {"promises": Promised(refusal=refuse(Reason.INVALID_REQUEST, "no such promise"))},
        {"tcp": TcpSite(listen="127.0.0.1", host="127.0.0.1", ports=range(20_000, 20_001), key="another-key")},
    ],
)
async def test_what_cannot_be_accounted_for_is_ended_and_its_id_is_nobody_s_until_then(tmp_path: Path, options) -> None:
    pid = await leave_one(tmp_path)
    async with supervising(tmp_path, fake_engine(), limits=SOON, **options) as supervisor:
        assert supervisor.adopt() == 0
        with pytest.raises(SollolError) as refused:
            await supervisor.start("p", plan_of("m"))
        assert refused.value.refusal.reason is Reason.INSTANCE_NOT_READY
        await wait_until(lambda: not runs(pid), what="it is ended")
        await wait_until(lambda: nothing_is_left(tmp_path), what="it is forgotten")


async def test_an_agent_that_ends_takes_what_nobody_accounts_for_along(tmp_path: Path) -> None:
    pid = await leave_one(tmp_path)
    truncated(files_of("p", directories(tmp_path)).state)
    async with supervising(tmp_path, fake_engine()) as supervisor:
        supervisor.adopt()
    assert not runs(pid)


async def test_engines_are_ended_without_an_agent_recorded_or_not(tmp_path: Path) -> None:
    async with supervising(tmp_path, fake_engine("ignore_term=1")) as supervisor:
        pids = [(await started(supervisor, name, plan_of("m"))).pid for name in ("p", "q")]
        await supervisor.close(leave=True)
    truncated(files_of("q", directories(tmp_path)).state)
    assert await end_everything(directories(tmp_path), grace_s=0.2) == 2
    assert not any(runs(pid) for pid in pids)
    assert not list((tmp_path / "run").glob("p*"))
    assert await end_everything(directories(tmp_path), grace_s=0.2) == 0


def test_an_instance_is_whole_when_every_process_that_it_had_is_there(tmp_path: Path) -> None:
    who = Identity(pid=1, started_ticks=1, boot_id="b")
    fields = {"instance_id": "p", "pool_id": "p", "reserved": {}, "socket": "", "started_unix_s": 0}
    record = Record(kind=InstanceKind.COORDINATOR, processes={ENGINE: who, "tunnel": who}, **fields)
    assert problem_of(record, {ENGINE: 0, "tunnel": 0}) == ""
    assert problem_of(record, {ENGINE: 0}) == "its tunnel is not there"
    backend = Record(kind=InstanceKind.BACKEND, processes={ENGINE: who}, **fields)
    assert problem_of(backend, {ENGINE: 0}) == f"its {FORWARDER} is not there"
    assert problem_of(backend, {}) == "its engine and forwarder are not there"


async def test_a_process_that_has_ended_has_no_identity(stranger: subprocess.Popen[bytes]) -> None:
    who = identity(stranger.pid)
    assert is_running(who)
    stranger.kill()
    await wait_until(lambda: not is_running(who), what="it has ended, and is a zombie")
    assert identity_of(stranger.pid) is None


def test_a_name_with_parentheses_does_not_hide_the_start_time(tmp_path: Path) -> None:
    odd = tmp_path / "a) Z (b"
    odd.symlink_to("/bin/sleep")
    with subprocess.Popen([odd, "60"]) as process:
        assert started_ticks(process.pid)
        process.kill()


async def test_a_stranger_whose_name_was_cut_inside_a_character_disturbs_nobody(tmp_path: Path) -> None:
    """The kernel keeps 15 bytes of a name; every process of the machine is looked at when a group is ended."""
    cut = r"import pathlib; pathlib.Path('/proc/self/comm').write_bytes(b'half-\xc3'); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", cut], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as stranger:
        assert stranger.stdout is not None
        stranger.stdout.readline()
        assert b"half-\xc3" in Path(f"/proc/{stranger.pid}/stat").read_bytes()
        assert started_ticks(stranger.pid)
        assert look_at(stranger.pid) is not None
        async with supervising(tmp_path, fake_engine("grandchild=1")) as supervisor:
            pid = (await started(supervisor, "p", plan_of("m"))).pid
            await supervisor.stop("p")
            assert not runs(pid)
        stranger.kill()


async def test_a_coordinator_that_ended_meanwhile_takes_nothing_of_the_backend_beside_it(
    tmp_path: Path, stranger: subprocess.Popen[bytes]
) -> None:
    """One node can run both for one pool; the backend's forwarder tells of itself in a file."""
    write_record(tmp_path, identity(stranger.pid, started_ticks=1))
    where = directories(tmp_path)
    theirs, ours = files_of(forwarder_id("p"), where).status, files_of(tunnel_id("p"), where).status
    for path in (theirs, ours):
        path.write_text("{}")
    async with supervising(tmp_path, fake_engine()) as supervisor:
        supervisor.adopt()
        assert (theirs.exists(), ours.exists()) == (True, False)
