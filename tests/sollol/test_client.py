# ruff: noqa: N802 -- a servicer's methods have gRPC's names
import asyncio
import contextlib
import subprocess
import sys

import pytest
import sollol
from sollol import wire
from sollol.channels import new_server, refusal_abort
from sollol.client import Client
from sollol.errors import Reason, Refusal, SollolError
from sollol.inference import Progress
from sollol.report import (
    Decision,
    Device,
    DeviceKind,
    Instance,
    InstanceState,
    NodeStatus,
    NodeVerdict,
    PlacementWish,
    Pool,
    Report,
    ScorePart,
)
from sollol.v1 import cluster_pb2 as pb
from sollol.v1 import cluster_pb2_grpc as rpc

from tests.waiting import wait_until

CPU = Device(device_id="CPU", kind=DeviceKind.CPU, total_bytes=10, free_bytes=5)
NODE = NodeStatus(
    report=Report(node_id="node-a", host="127.0.0.1", port=7462, devices=(CPU,)), report_age_s=0.5, connected=True
)
POOL = Pool(
    node_id="node-a", instance=Instance(instance_id="pool-0", model="tiny", state=InstanceState.READY, percent=100.0)
)
DECISION = Decision(
    model="tiny", policy="classic", unit="MB", coordinator="node-a", coordinator_host="127.0.0.1",
    nodes=(NodeVerdict(node_id="node-a", host="127.0.0.1", score=5.0, parts=(ScorePart("ram", 5.0),), best=True),),
)  # fmt: skip
WISH = PlacementWish(model="tiny", policy="classic", require=("gpu_node",), pinned_node="node-a")
NOT_FOUND = Refusal(reason=Reason.MODEL_NOT_FOUND, message="no node has a model named nope")


class FakeCluster(rpc.ClusterServiceServicer):
    def __init__(self):
        self.wishes = []
        self.left = False

    async def ListNodes(self, request, context):
        return pb.ListNodesResponse(nodes=[wire.fill(pb.NodeStatus(), NODE)])

    async def ListPools(self, request, context):
        return pb.ListPoolsResponse(pools=[wire.fill(pb.Pool(), POOL)])

    async def Place(self, request, context):
        self.wishes.append(wire.value(PlacementWish, request.wish))
        return pb.PlaceResponse(decision=wire.fill(pb.Decision(), DECISION))

    async def Load(self, request, context):
        wish = wire.value(PlacementWish, request.wish)
        if wish.model == "nope":
            await refusal_abort(context, NOT_FOUND)
        for percent in (10.0, 60.0):
            yield pb.LoadResponse(
                progress=wire.fill(pb.LoadResponse().progress, Progress(state="loading", percent=percent))
            )
        yield pb.LoadResponse(pool=wire.fill(pb.Pool(), POOL))

    async def Unload(self, request, context):
        if request.model == "nope":
            await refusal_abort(context, NOT_FOUND)
        return pb.UnloadResponse(instance_ids=["pool-0"])

    async def TailPoolLog(self, request, context):
        try:
            yield pb.TailPoolLogResponse(lines=[f"{request.pool} {number}" for number in range(request.lines)])
            if request.follow:
                await asyncio.Event().wait()
        finally:
            self.left = True


@pytest.fixture
async def head(ports):
    servicer, server = FakeCluster(), new_server()
    rpc.add_ClusterServiceServicer_to_server(servicer, server)
    address = f"127.0.0.1:{ports()}"
    server.add_insecure_port(address)
    await server.start()
    async with Client(address) as client:
        yield servicer, client
    await server.stop(0)


async def test_operators_get_contract_values(head):
    servicer, client = head
    assert await client.nodes() == (NODE,)
    assert await client.pools() == (POOL,)
    assert await client.place(WISH) == DECISION
    assert servicer.wishes == [WISH]
    assert await client.unload("tiny") == ("pool-0",)


async def test_a_load_tells_its_progress_and_returns_the_pool(head):
    _, client = head
    told = []
    assert await client.load(WISH, on_progress=told.append) == POOL
    assert [progress.percent for progress in told] == [10.0, 60.0]
    assert await client.load(WISH) == POOL


async def test_refusals_arrive_as_they_were_sent(head):
    _, client = head
    for asking in (client.load(PlacementWish(model="nope")), client.unload("nope")):
        with pytest.raises(SollolError) as caught:
            await asking
        assert caught.value.refusal == NOT_FOUND


async def test_a_followed_log_is_left_when_its_reader_leaves(head):
    servicer, client = head
    assert [line async for line in client.tail_log("pool-0", lines=2)] == ["pool-0 0", "pool-0 1"]
    servicer.left = False
    async with contextlib.aclosing(client.tail_log("tiny", lines=1, follow=True)) as lines:
        assert await anext(lines) == "tiny 0"
    await wait_until(lambda: servicer.left, within_s=1, what="the call was cancelled")


async def test_a_head_that_is_not_there_is_one_clear_refusal(ports):
    async with Client(f"127.0.0.1:{ports()}") as client:
        with pytest.raises(SollolError, match=r"the head at 127\.0\.0\.1:") as caught:
            await client.nodes()
    assert caught.value.refusal.reason is Reason.AGENT_UNREACHABLE


async def test_a_client_that_was_not_entered_says_so():
    with pytest.raises(RuntimeError, match="async with"):
        await Client().nodes()


def test_the_client_is_imported_on_first_use_only():
    assert sollol.Client is Client
    code = "import sys, sollol; assert 'grpc' not in sys.modules; sollol.Client; assert 'grpc' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    with pytest.raises(AttributeError):
        _ = sollol.Nothing
