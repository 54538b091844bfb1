"""How a cluster ends: in order when asked to, and without orphans when it is killed."""

import asyncio
import signal

import pytest
from sollol.errors import Reason

from sollold.cli.children import is_error
from tests.e2e.cluster import text_of
from tests.e2e.daemons import Up, family, gone, running, short_home
from tests.e2e.models import RANDOM, RECITER
from tests.waiting import wait_until

pytestmark = pytest.mark.engine
LONG = 4000
GONE_WITHIN_S = 15  # the grace of streams, then that of an engine, then the farewell to a Redis that is gone too


def named(processes):
    """What kinds of processes these are."""
    kinds = ("llama-server", "redis-server", "sollold.cli", "-m sollold", "-m agent")
    lines = running(processes)
    return {kind for kind in kinds if any(kind in line for line in lines)}


async def in_the_middle(up):
    """A stream that runs, as the task that reads it to its end, and all processes of the cluster."""
    begun = asyncio.Event()

    async def read():
        last = {}
        async with up.stream(RANDOM, max_tokens=LONG) as events:
            async for event in events:
                last = event
                if text_of(event):
                    begun.set()
        return last

    reading = asyncio.create_task(read())
    await asyncio.wait_for(begun.wait(), 20)
    processes = family(up.process.pid)
    assert named(processes) == {"llama-server", "redis-server", "sollold.cli", "-m sollold", "-m agent"}
    return reading, processes


def errors_logged(up):
    lines = [line for log in (up.state / "log").glob("*.log") for line in log.read_text().splitlines()]
    return [line for line in lines if is_error(line)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_in_the_middle_of_a_generation_ends_everything_with_status_0(start_up, engine_binary, number):
    up = start_up(engine_binary, agents=2)
    await up.say(RECITER)  # an idle engine, and a busy one
    reading, processes = await in_the_middle(up)

    status = await up.end(number)

    assert status == 0, up.errors
    assert running(processes) == []
    assert (await reading)["error"]["code"] == Reason.SHUTTING_DOWN
    assert not list((up.home / "run").rglob("*.sock"))
    assert [line for line in up.errors.splitlines() if line != "stopping"] == []


async def test_a_short_generation_is_let_to_its_end(start_up, engine_binary):
    up = start_up(engine_binary, environ={"SOLLOL_HEAD_SHUTDOWN_GRACE_S": "10"})
    await up.say(RANDOM)
    begun = asyncio.Event()

    async def read():
        count = 0
        async with up.stream(RANDOM, max_tokens=400) as events:
            async for event in events:
                count += bool(text_of(event))
                begun.set()
        return count, event

    reading = asyncio.create_task(read())
    await asyncio.wait_for(begun.wait(), 10)

    status = await up.end()

    assert status == 0
    assert await reading == (400, {"done": True})


async def test_everything_leaves_by_itself_when_up_is_killed(start_up, engine_binary):
    up = start_up(engine_binary, agents=2)
    reading, processes = await in_the_middle(up)

    await up.end(signal.SIGKILL)

    await gone(processes, GONE_WITHIN_S, "the children of a killed `sollol up` leave")
    assert (await reading)["error"]["code"]
    assert errors_logged(up) == []


@pytest.mark.parametrize("victim", ["head", "agent"])
async def test_a_daemon_that_is_killed_takes_the_rest_with_it_and_leaves_no_engine(start_up, engine_binary, victim):
    up = start_up(engine_binary, agents=1)
    await up.say(RECITER)
    processes = family(up.process.pid)
    words = ["-m", "sollold"] if victim == "head" else ["-m", "agent"]

    killed = next(process for process in processes if process.cmdline()[2:4] == words)
    killed.kill()
    status = await asyncio.to_thread(up.process.wait, 20)

    assert status == 6
    assert "ended by itself with status -9" in up.errors
    await gone(processes, GONE_WITHIN_S, f"nothing is left when the {victim} was killed")


@pytest.mark.parametrize("newest", ["sollold.cli", "redis-server", "-m sollold", "-m agent"])
async def test_a_signal_while_everything_still_starts_leaves_nothing(models_dir, engine_binary, ports, newest):
    with short_home() as home:
        up = Up(home, ports, models=models_dir, engine=engine_binary, agents=1)
        try:
            await wait_until(
                lambda: newest in named(family(up.process.pid)), within_s=60, what=f"{newest} has been started"
            )
            processes = family(up.process.pid)
            status = await up.end()
        finally:
            up.close()

        await gone(processes, GONE_WITHIN_S, "everything that had been started is gone")
        assert status in (0, -signal.SIGTERM), up.errors  # the latter before it listens to signals
        assert [line for line in up.errors.splitlines() if line != "stopping"] == []


async def test_a_second_signal_ends_everything_at_once(start_up, engine_binary):
    up = start_up(engine_binary, environ={"SOLLOL_HEAD_SHUTDOWN_GRACE_S": "60"})
    reading, processes = await in_the_middle(up)
    up.process.send_signal(signal.SIGTERM)
    await wait_until(lambda: "stopping" in up.errors, what="the first signal is taken")

    status = await up.end()

    assert status == 0
    assert running(processes) == []
    await asyncio.gather(reading, return_exceptions=True)  # its connection was cut
