"""The agent as a process: one owner per state directory and port, and an orderly end."""

import asyncio
import json
import signal
import socket
import tempfile
from pathlib import Path

import pytest
from redis import Redis
from sollol.channels import open_channel
from sollol.errors import SURFACES, Reason
from sollol.lifecycle import Stop
from sollol.v1 import agent_pb2, agent_pb2_grpc, common_pb2

from agent.app import _before_stop
from tests.daemon import agent_flags, daemon, start_engine, write_engine
from tests.supervised import runs
from tests.waiting import wait_until


@pytest.fixture
def home():
    with tempfile.TemporaryDirectory(prefix="sa") as directory:
        yield Path(directory)


def keys(url):
    with Redis.from_url(url) as redis:
        return {key.decode() for key in redis.scan_iter()}


async def test_at_its_end_engines_are_stopped_and_the_registry_knows_it(ports, home, clean_redis, reciting_model):
    engine, port = write_engine(home / "engine"), ports()
    flags = agent_flags(home, port=port, engine=engine, model=reciting_model, redis_url=clean_redis)
    async with daemon("agent", home, *flags) as agent:
        await agent.says("agent_ready")
        assert (await start_engine(port)).pid
        await wait_until(
            lambda: (
                keys(clean_redis)
                == {
                    *("sollol:nodes", "sollol:node:a", "sollol:agent:a", "sollol:owner:a"),
                    f"sollol:rpc:node:127.0.0.1:{port}",
                }
            ),
            what="published",
        )

        assert await agent.end() == 0

        events = agent.events()
        assert events[-1] == "stopped"
        assert "task_ended_early" not in events
    assert keys(clean_redis) == set()
    # That no engine is left, the fixture that looks for processes asserts.


async def report_of(port):
    async with open_channel(f"127.0.0.1:{port}") as channel:
        stub = agent_pb2_grpc.AgentServiceStub(channel)
        return (await stub.GetReport(agent_pb2.GetReportRequest(), timeout=5)).report


async def report_once_ready(port):
    """A report that shows every instance ready: it follows the fact a moment later."""

    async def shown():
        report = await report_of(port)
        states = {each.state for each in report.instances}
        return report if states == {common_pb2.INSTANCE_STATE_READY} else None

    return await wait_until(shown, within_s=20, what="the engine is reported ready")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_engines_outlive_an_agent_that_is_restarted_or_killed(ports, home, reciting_model, number):
    """And are ended by one that shall not leave them."""
    engine, port = write_engine(home / "engine"), ports()
    flags = agent_flags(home, port=port, engine=engine, model=reciting_model)
    async with daemon("agent", home, *flags, "--leave-engines") as agent:
        await agent.says("agent_ready")
        pid = (await start_engine(port)).pid
        before = await report_once_ready(port)
        agent.process.send_signal(number)
        assert await agent.ended() == (0 if number is signal.SIGTERM else -number)
    assert runs(pid)

    async with daemon("agent", home, *flags) as agent:
        await agent.says("agent_ready")
        after = await report_of(port)
        assert [(each.instance_id, each.pid) for each in after.instances] == [("p", pid)]
        assert after.instances[0].state == before.instances[0].state, "READY in the first report that it gives"
        assert after.reservations == before.reservations
        assert after.devices[0].reserved_bytes == before.devices[0].reserved_bytes > 0
        assert await agent.end() == 0
    assert not runs(pid)


async def test_what_only_the_engine_knows_to_be_free_is_known_to_the_next_agent_at_once(ports, home, reciting_model):
    """Not a minute later: a list from before an instance was ready counts for nothing, and it is told of that one."""
    engine, port = write_engine(home / "engine"), ports()
    gpu = 'echo "  Vulkan0: Some GPU (16384 MiB, 15000 MiB free)"'
    engine.write_text(engine.read_text().replace('"Available devices:"', f'"Available devices:"; {gpu}'))
    flags = agent_flags(home, port=port, engine=engine, model=reciting_model)

    async def free():
        devices = {each.device_id: each.free_bytes for each in (await report_of(port)).devices}
        return devices["Vulkan0"] == 15_000 << 20

    async with daemon("agent", home, *flags, "--leave-engines") as agent:
        await agent.says("agent_ready")
        await start_engine(port)
        await wait_until(free, within_s=20, what="the engine was asked when an instance was ready")
        assert await agent.end() == 0
    async with daemon("agent", home, *flags) as agent:
        await agent.says("agent_ready")
        await wait_until(free, within_s=20, what="the next agent has asked too")


async def test_engines_that_were_left_are_ended_on_demand_and_never_those_of_a_running_agent(
    ports, home, reciting_model
):
    engine, port = write_engine(home / "engine"), ports()
    flags = agent_flags(home, port=port, engine=engine, model=reciting_model)
    async with daemon("agent", home, *flags, "--leave-engines") as agent:
        await agent.says("agent_ready")
        pid = (await start_engine(port)).pid
        async with daemon("agent", home, *flags, "--end-engines") as ending:
            assert await ending.ended() == 6
        assert "another agent uses" in ending.log
        assert await agent.end() == 0
    assert runs(pid)

    for instances in (1, 0):
        async with daemon("agent", home, *flags, "--end-engines") as ending:
            assert await ending.ended() == 0
        assert f'"instances": {instances}' in ending.log or f'"instances":{instances}' in ending.log
        assert not runs(pid)


async def test_the_report_says_how_fast_the_memory_is_for_the_threads_of_its_engines(ports, home, reciting_model):
    engine, port = write_engine(home / "engine"), ports()
    flags = agent_flags(home, port=port, engine=engine, model=reciting_model)
    async with daemon("agent", home, *flags, "--threads", "3") as agent:
        await agent.says("agent_ready")
        async with open_channel(f"127.0.0.1:{port}") as channel:
            asked = await agent_pb2_grpc.AgentServiceStub(channel).GetReport(agent_pb2.GetReportRequest())
    kept = json.loads((home / "a" / "s" / "bandwidth.json").read_text())
    assert asked.report.engine.threads == kept["threads"] == 3
    assert asked.report.devices[0].bandwidth_bytes_per_s == kept["bytes_per_s"] > 0


async def test_a_second_agent_with_the_same_state_directory_is_refused(ports, home, reciting_model):
    engine, port = write_engine(home / "engine"), ports()
    flags = agent_flags(home, port=port, engine=engine, model=reciting_model)
    async with daemon("agent", home, *flags) as first:
        await first.says("agent_ready")
        assert (await start_engine(port)).pid

        async with daemon("agent", home, *flags, "--port", str(ports())) as second:
            assert await second.ended() == 6

        assert "another agent uses" in second.log
        assert "Traceback" not in second.log
        async with open_channel(f"127.0.0.1:{port}") as channel:
            report = await agent_pb2_grpc.AgentServiceStub(channel).GetReport(agent_pb2.GetReportRequest(), timeout=5)
        assert [instance.instance_id for instance in report.report.instances] == ["p"], "the first's engine lives"


async def test_a_second_agent_of_a_node_s_name_is_refused_and_the_first_untouched(
    ports, home, clean_redis, reciting_model
):
    engine, port = write_engine(home / "engine"), ports()
    flags = agent_flags(home, port=port, engine=engine, model=reciting_model, redis_url=clean_redis)
    twin = agent_flags(home, node="b", port=ports(), engine=engine, model=reciting_model, redis_url=clean_redis)
    async with daemon("agent", home, *flags) as first:
        await first.says("agent_ready")
        assert (await start_engine(port)).pid
        published = {"sollol:node:a", "sollol:owner:a"}
        await wait_until(lambda: published <= keys(clean_redis), what="published")

        async with daemon("agent", home, *twin, "--node-id", "a") as second:
            assert await second.ended() == SURFACES[Reason.NODE_ID_IN_USE].exit_code

        assert "NODE_ID_IN_USE" in second.log
        assert "Traceback" not in second.log
        assert published <= keys(clean_redis), "the second has taken nothing down"
        assert [instance.instance_id for instance in (await report_of(port)).instances] == ["p"]
        assert await first.end() == 0
    async with daemon("agent", home, *twin, "--node-id", "a") as later:
        await later.says("agent_ready")  # the name is free at once


async def test_a_killed_agent_has_its_name_when_it_is_back_at_once(ports, home, clean_redis, reciting_model):
    engine = write_engine(home / "engine")
    flags = agent_flags(home, port=ports(), engine=engine, model=reciting_model, redis_url=clean_redis)
    async with daemon("agent", home, *flags) as agent:
        await agent.says("agent_ready")
        await wait_until(lambda: "sollol:owner:a" in keys(clean_redis), what="published")
        agent.process.kill()
    async with daemon("agent", home, *flags) as agent:
        await agent.says("agent_ready")


async def test_without_redis_an_agent_starts_and_says_that_its_name_is_not_checked(ports, home, reciting_model):
    engine = write_engine(home / "engine")
    flags = agent_flags(
        home, port=ports(), engine=engine, model=reciting_model, redis_url=f"redis://127.0.0.1:{ports()}"
    )
    async with daemon("agent", home, *flags) as agent:
        await agent.says("agent_ready")
        assert "node_id_not_checked" in agent.events()


async def test_a_taken_port_is_refused_before_anything_is_published(ports, home, clean_redis, reciting_model):
    """Published and withdrawn again, it would take the seed's record of the agent that has the port with it."""
    engine, port = write_engine(home / "engine"), ports()
    flags = agent_flags(home, port=port, engine=engine, model=reciting_model, redis_url=clean_redis)
    with socket.socket() as taken, Redis.from_url(clean_redis) as redis:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        redis.set(f"sollol:rpc:node:127.0.0.1:{port}", "the first's", ex=60)
        async with daemon("agent", home, *flags) as agent:
            assert await agent.ended() == 6
        assert keys(clean_redis) == {f"sollol:rpc:node:127.0.0.1:{port}"}

    assert "PORT_TAKEN" in agent.log
    assert "Traceback" not in agent.log


async def test_a_signal_or_a_failed_part_ends_the_wait_for_a_first_report_that_never_comes():
    stop = Stop()
    waiting = asyncio.create_task(_before_stop(asyncio.Event().wait(), stop))
    await asyncio.sleep(0)

    stop.request("report ended")

    assert await asyncio.wait_for(waiting, 1) is False
    assert await _before_stop(asyncio.sleep(0), Stop()) is True
