"""The head as a process: how it starts, and in which order it ends."""

import socket
import tempfile
from pathlib import Path

import aiohttp
import pytest
from sollol.channels import open_channel
from sollol.v1 import agent_pb2, agent_pb2_grpc

from tests.daemon import agent_flags, daemon, write_engine
from tests.waiting import wait_until

NO_REDIS = "unix:///nowhere/redis.sock"


@pytest.fixture
def home():
    with tempfile.TemporaryDirectory(prefix="sh") as directory:
        yield Path(directory)


class Head:
    def __init__(self, ports, *agents):
        self.http, self.grpc = ports(), ports()
        self.flags = ["--http-port", str(self.http), "--grpc-port", str(self.grpc), "--redis-url", NO_REDIS]
        if agents:
            self.flags += ["--agents", ",".join(agents)]

    async def get(self, path):
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{self.http}{path}") as response:
            return response.status

    def post(self, session, *, stream):
        body = {"model": "tiny-reciter", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
        return session.post(f"http://127.0.0.1:{self.http}/v1/chat/completions", json=body)


async def ready(head, process):
    await process.says("head_ready")

    async def answers():
        return await head.get("/readyz") == 200

    await wait_until(answers, what="ready")


async def test_a_head_alone_serves_is_not_ready_and_ends_in_order(ports, home):
    head = Head(ports)
    async with daemon("sollold", home, *head.flags) as process:
        await process.says("head_ready")

        assert await head.get("/healthz") == 200
        assert await head.get("/readyz") == 503
        assert await process.end() == 0
        assert process.events()[-1] == "stopped"


@pytest.mark.parametrize("which", ["http", "grpc"])
async def test_a_taken_port_is_one_clear_refusal(ports, home, which):
    head = Head(ports)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", getattr(head, which)))
        taken.listen()
        async with daemon("sollold", home, *head.flags) as process:
            assert await process.ended() == 6

    assert "PORT_TAKEN" in process.log
    assert f"{which}_port" in process.log
    assert "Traceback" not in process.log


async def test_at_shutdown_a_stream_ends_in_its_own_time_and_the_engine_stays(ports, home, reciting_model):
    """HTTP goes first, while relays still live; the registry being away all the time matters to nobody."""
    engine, port = write_engine(home / "engine", "rate=30", "tokens=30"), ports()
    head = Head(ports, f"127.0.0.1:{port}")
    flags = agent_flags(home, port=port, engine=engine, model=reciting_model)
    async with daemon("agent", home, *flags) as agent, daemon("sollold", home, *head.flags) as process:
        await ready(head, process)
        async with aiohttp.ClientSession() as session, head.post(session, stream=True) as response:
            first = await response.content.readuntil(b"t0")
            process.process.terminate()
            rest = await response.content.read()
            assert await process.ended() == 0

        assert b"t29" in first + rest
        assert rest.rstrip().endswith(b"[DONE]")
        events = process.events()
        assert events.index("stop_requested") < events.index("stopped")
        assert "closing_step_failed" not in events
        assert [instance.state for instance in await instances(port)], "another head finds it warm"
        assert await agent.end() == 0


async def test_at_shutdown_who_waits_for_a_load_is_told_and_the_next_head_finds_it_loading(ports, home, reciting_model):
    engine, port = write_engine(home / "engine", "load_s=4"), ports()
    head = Head(ports, f"127.0.0.1:{port}")
    flags = agent_flags(home, port=port, engine=engine, model=reciting_model)
    async with daemon("agent", home, *flags) as agent, aiohttp.ClientSession() as session:
        async with daemon("sollold", home, *head.flags, "--shutdown-grace-s", "0.2") as it:
            await ready(head, it)
            async with head.post(session, stream=True) as response:
                await response.content.readuntil(b"loading")
                (loading,) = await instances(port)
                it.process.terminate()
                rest = await response.content.read()
                assert await it.ended() == 0

        assert b"SHUTTING_DOWN" in rest
        async with daemon("sollold", home, *head.flags) as it:
            await ready(head, it)
            assert (await answer(head, session))[0] == 200
            (served,) = await instances(port)
            assert (served.instance_id, served.pid) == (loading.instance_id, loading.pid)
            assert await it.end() == 0
        assert await agent.end() == 0


async def answer(head, session):
    async with head.post(session, stream=False) as response:
        return response.status, await response.json()


async def report(port):
    async with open_channel(f"127.0.0.1:{port}") as channel:
        stub = agent_pb2_grpc.AgentServiceStub(channel)
        return (await stub.GetReport(agent_pb2.GetReportRequest(), timeout=5)).report


async def instances(port):
    return list((await report(port)).instances)
