"""A whole agent, asked over gRPC to lend its CPU to a coordinator of its own; the engine is real."""

import os
import signal
import tempfile
from pathlib import Path

import pytest
from msgspec import structs
from sollol import wire
from sollol.channels import open_channel
from sollol.report import BackendEndpoint, CoordinatorPlan, DeviceShare, InstanceKind, InstanceState, Report
from sollol.v1 import agent_pb2, agent_pb2_grpc

from tests.daemon import agent_flags, daemon
from tests.waiting import wait_until

pytestmark = pytest.mark.engine
MIB = 1 << 20
OWN = DeviceShare(device_id="CPU", layers=0, margin_bytes=64 * MIB, total_bytes=64 * MIB)
LENT = DeviceShare(device_id="CPU", layers=9, node_id="a", margin_bytes=64 * MIB, total_bytes=64 * MIB)
PLAN = CoordinatorPlan(model="tiny-reciter", parallel=1, context_per_slot=512, shares=(OWN, LENT), threads=1)


@pytest.fixture
def home():
    with tempfile.TemporaryDirectory(prefix="sl") as directory:
        yield Path(directory)


async def start_split(stub):
    """Reserve, lend and start as a head does; the coordinator as it is when it serves."""
    reserved = await stub.Reserve(agent_pb2.ReserveRequest(pool_id="p", bytes={"CPU": 128 * MIB}, ttl_s=30))
    assert not reserved.HasField("refusal"), reserved
    lent = await stub.StartBackend(
        agent_pb2.StartBackendRequest(
            pool_id="p", device_ids=["CPU"], threads=1, allowed_hosts=["127.0.0.1"], attach_within_s=20
        )
    )
    assert not lent.HasField("refusal"), lent
    endpoint = wire.value(BackendEndpoint, lent.endpoint)
    request = agent_pb2.StartCoordinatorRequest(pool_id="p")
    wire.fill(request.plan, structs.replace(PLAN, backends=(endpoint,)))
    started = await stub.StartCoordinator(request)
    assert not started.HasField("refusal"), started.refusal
    async for response in stub.WatchInstance(agent_pb2.WatchInstanceRequest(instance_id="p")):
        last = response.instance
    return last


async def report_of(stub):
    return wire.value(Report, (await stub.GetReport(agent_pb2.GetReportRequest())).report)


async def test_it_lends_reports_and_gives_everything_back(ports, home, engine_binary, reciting_model):
    port, first = ports(), ports()
    flags = agent_flags(home, port=port, engine=engine_binary, model=reciting_model)
    async with daemon("agent", home, *flags, "--rpc-ports", f"{first}-{first + 20}") as agent:
        await agent.says("agent_ready")
        async with open_channel(f"127.0.0.1:{port}") as channel:
            stub = agent_pb2_grpc.AgentServiceStub(channel)
            ready = await start_split(stub)
            assert wire.value(Report, (await stub.GetReport(agent_pb2.GetReportRequest())).report).reservations
            assert ready.pid

            async def both():
                found = {item.kind: item for item in (await report_of(stub)).instances}
                states = [item.state for item in found.values()]
                return found if states == [InstanceState.READY] * 2 else None

            found = await wait_until(both, within_s=20, what="both are reported ready")
            assert {item.pool_id for item in found.values()} == {"p"}

            os.kill(found[InstanceKind.BACKEND].pid, signal.SIGKILL)

            async def nothing_held():
                report = await report_of(stub)
                failed = {item.state for item in report.instances} == {InstanceState.FAILED}
                return report if failed and not report.reservations else None

            report = await wait_until(nothing_held, within_s=2, what="both have failed and nothing is reserved")
            assert all(item.refusal for item in report.instances)
            await wait_until(lambda: start_split(stub), within_s=10, what="it can be started again")
            await stub.Stop(agent_pb2.StopRequest(instance_id="p"))

            async def nothing_left():
                report = await report_of(stub)
                return not report.reservations and not report.instances

            await wait_until(nothing_left, what="nothing is left")
        assert await agent.end() == 0
