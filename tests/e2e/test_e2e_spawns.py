"""Spawning children while gRPC streams run. With grpc's fork handlers on, some die before exec."""

import asyncio

import pytest
from sollol.channels import new_server, open_channel
from sollol.v1 import agent_pb2, agent_pb2_grpc

from tests.waiting import wait_until

STREAMS, SPAWNS, AT_ONCE = 8, 300, 10


class Chatter(agent_pb2_grpc.AgentServiceServicer):
    """Streams without a pause for as long as it is read."""

    async def TailLog(self, request, context):  # noqa: N802 - gRPC names the method
        while True:
            yield agent_pb2.TailLogResponse(lines=["x" * 100])


@pytest.fixture
async def streams(tmp_path):
    """Client and server in this process; the counts of what each stream has received so far."""
    address = f"unix:{tmp_path}/grpc.sock"
    server = new_server()
    agent_pb2_grpc.add_AgentServiceServicer_to_server(Chatter(), server)
    server.add_insecure_port(address)
    await server.start()
    counts = [0] * STREAMS

    async def read(number, stub):
        async for _ in stub.TailLog(agent_pb2.TailLogRequest()):
            counts[number] += 1

    async with open_channel(address) as channel:
        stub = agent_pb2_grpc.AgentServiceStub(channel)
        readers = [asyncio.create_task(read(number, stub)) for number in range(STREAMS)]
        await wait_until(lambda: all(counts), what="every stream runs")
        yield counts
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
    await server.stop(0)


async def test_300_children_spawned_under_stream_load_all_end_well(streams):
    gate = asyncio.Semaphore(AT_ONCE)

    async def spawn():
        async with gate:
            process = await asyncio.create_subprocess_exec("/bin/true", start_new_session=True)
            return await process.wait()

    before = list(streams)
    statuses = await asyncio.wait_for(asyncio.gather(*(spawn() for _ in range(SPAWNS))), 60)

    assert statuses == [0] * SPAWNS
    await wait_until(
        lambda: all(after > count for after, count in zip(streams, before, strict=True)), what="every stream runs on"
    )
