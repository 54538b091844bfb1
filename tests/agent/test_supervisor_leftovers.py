"""What a crashed agent leaves, the next one ends: that, and nothing else."""

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from agent.supervisor.files import files_of
from agent.supervisor.leftovers import Identity, boot_id, is_running, reap, remember, started_ticks
from tests.fakes.fake_engine import fake_engine
from tests.supervised import directories, plan_of, runs, started, supervising
from tests.waiting import wait_until


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        yield process
        process.kill()


def write(tmp_path: Path, identity: Identity) -> Path:
    where = directories(tmp_path)
    where.create()
    path = files_of(identity.instance_id, where).state
    path.write_bytes(msgspec.json.encode(identity))
    return path


def identity_of(pid: int, **changes: object) -> Identity:
    ticks = started_ticks(pid)
    assert ticks is not None
    return msgspec.structs.replace(
        Identity(instance_id="p", pid=pid, started_ticks=ticks, boot_id=boot_id()), **changes
    )


async def test_a_running_engine_has_its_state_written_down(tmp_path: Path) -> None:
    async with supervising(tmp_path, fake_engine()) as supervisor:
        pid = (await started(supervisor, "p", plan_of("m"))).pid
        path = files_of("p", directories(tmp_path)).state
        assert msgspec.json.decode(path.read_bytes(), type=Identity) == identity_of(pid)


async def test_the_next_agent_ends_what_a_crashed_one_left(tmp_path: Path) -> None:
    """The crashed agent is a process of its own, killed while it supervises."""
    agent = await asyncio.create_subprocess_exec(*crashing_agent(tmp_path), stdout=asyncio.subprocess.PIPE)
    assert agent.stdout is not None
    pid = int(await asyncio.wait_for(agent.stdout.readline(), 20))
    agent.kill()
    await agent.wait()
    assert runs(pid), "an agent's death must not end its engines"
    async with supervising(tmp_path, fake_engine()) as supervisor:
        assert await supervisor.reap_leftovers() == 1
        assert not runs(pid)
        assert not list((tmp_path / "run").iterdir())
        assert not list((tmp_path / "state" / "instances").iterdir())
        await started(supervisor, "p", plan_of("m"))


def crashing_agent(tmp_path: Path) -> list[str]:
    code = """
import asyncio, sys
from pathlib import Path
from tests.fakes.fake_engine import fake_engine
from tests.supervised import plan_of, started, supervising

async def main():
    async with supervising(Path(sys.argv[1]), fake_engine()) as supervisor:
        print((await started(supervisor, "p", plan_of("m"))).pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""
    import sys

    return [sys.executable, "-c", "import structlog; structlog.configure(logger_factory=structlog.PrintLoggerFactory(__import__('sys').stderr))\n" + code, str(tmp_path)]  # fmt: skip


@pytest.mark.parametrize("changes", [{"started_ticks": 1}, {"boot_id": "another boot"}])
async def test_a_stranger_with_the_same_pid_is_left_alone(
    tmp_path: Path, stranger: subprocess.Popen[bytes], changes: dict[str, object]
) -> None:
    path = write(tmp_path, identity_of(stranger.pid, **changes))
    assert await reap(directories(tmp_path)) == 0
    assert stranger.poll() is None
    assert not path.exists()


async def test_one_that_has_ended_is_forgotten(tmp_path: Path, stranger: subprocess.Popen[bytes]) -> None:
    identity = identity_of(stranger.pid)
    stranger.kill()
    await wait_until(lambda: not is_running(identity), what="it has ended")
    path = write(tmp_path, identity)
    assert await reap(directories(tmp_path)) == 0
    assert not path.exists()


@pytest.mark.parametrize("content", [b"", b"{", b'{"pid": 1}', b"\xff" * 100, b'{"pid": "1", "boot_id": 2}'])
async def test_a_corrupt_file_is_put_aside_and_ends_nobody(tmp_path: Path, content: bytes) -> None:
    where = directories(tmp_path)
    where.create()
    path = files_of("p", where).state
    path.write_bytes(content)
    assert await reap(where) == 0
    assert [item.name for item in where.instances.iterdir()] == ["p.json.corrupt"]


def test_a_process_that_ended_at_once_is_not_written_down(tmp_path: Path) -> None:
    where = directories(tmp_path)
    where.create()
    process = subprocess.Popen(["true"])
    process.wait()
    remember("p", process.pid, files_of("p", where))
    assert not list(where.instances.iterdir())


def test_a_name_with_parentheses_does_not_hide_the_start_time(tmp_path: Path) -> None:
    odd = tmp_path / "a) Z (b"
    odd.symlink_to("/bin/sleep")
    with subprocess.Popen([odd, "60"]) as process:
        assert started_ticks(process.pid)
        process.kill()
