"""A head that answers the CLI from fixed values: real gRPC, no cluster behind it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from msgspec.structs import replace
from sollol import wire
from sollol.channels import new_server, refusal_abort
from sollol.errors import Reason, Refusal, refuse
from sollol.inference import AvailableModel, Piece, Progress
from sollol.link import Link
from sollol.report import DeviceShare, Instance, InstanceState, NodeStatus, PlacementWish, Pool
from sollol.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc

from sollold.placement import PlacementDefaults, decide
from tests.placement_cases import MODEL, cpu, gpu, node

LINKS = (
    Link(node_id="small", rtt_s=0.00031, bytes_per_s=112e6, age_s=40.0),
    Link(node_id="attic", unreachable=True, age_s=3.0),
)
BIG = node("big", cpu(), gpu())
NODES: tuple[NodeStatus, ...] = (
    replace(BIG, report=replace(BIG.report, links=LINKS)),
    node("small", cpu(free=2**30), engine=False),
)
READY = Instance(instance_id="tiny-0", model=MODEL, state=InstanceState.READY, parallel=4, active_streams=1)
SHARES = (
    DeviceShare(device_id="CPU", layers=0, total_bytes=2**29),
    DeviceShare(node_id="small", device_id="CPU", layers=21, first_layer=0, last_layer=20, total_bytes=2**31),
    DeviceShare(device_id="CUDA0", layers=12, first_layer=21, last_layer=31, total_bytes=2**30),
)
POOLS = (
    Pool(
        node_id="big",
        instance=replace(
            READY,
            shares=SHARES,
            endpoint="http://10.0.0.1:18080",
            predicted_ms_per_token=18.75,
            observed_ms_per_token=16.6,
        ),
    ),
    Pool(node_id="small", instance=replace(READY, instance_id="tiny-1", pool_number=1, active_streams=0)),
)
UNKNOWN = refuse(Reason.MODEL_NOT_FOUND, "no node has a model named 'nope'; closest: tiny:8b").refusal
DEAD = Refusal(reason=Reason.ENGINE_DIED, message="the engine died", log_lines=("last words",))


class FakeHead(cluster_pb2_grpc.ClusterServiceServicer, inference_pb2_grpc.InferenceServiceServicer):
    """Model `nope` is unknown; `dies` sends one piece and then fails."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    async def ListNodes(self, _request, _context):  # noqa: N802 - gRPC's name
        response = cluster_pb2.ListNodesResponse()
        for status in NODES:
            wire.fill(response.nodes.add(), status)
        return response

    async def ListPools(self, _request, _context):  # noqa: N802 - gRPC's name
        response = cluster_pb2.ListPoolsResponse()
        for pool in reversed(POOLS):
            wire.fill(response.pools.add(), pool)
        return response

    async def ListModels(self, _request, _context):  # noqa: N802 - gRPC's name
        response = inference_pb2.ListModelsResponse()
        wire.fill(response.models.add(), AvailableModel(name=MODEL, size_bytes=2**30, node_ids=("big",), warm=True))
        wire.fill(response.models.add(), AvailableModel(name="broken", problem=DEAD))
        return response

    async def Place(self, request, _context):  # noqa: N802 - gRPC's name
        wish = wire.value(PlacementWish, request.wish)
        self.asked.append(wish)
        response = cluster_pb2.PlaceResponse()
        wire.fill(response.decision, decide(wish, NODES, PlacementDefaults()))
        return response

    async def Load(self, request, context):  # noqa: N802 - gRPC's name
        if request.wish.model == "nope":
            await refusal_abort(context, UNKNOWN)
        yield cluster_pb2.LoadResponse(progress=wire.fill(inference_pb2.Progress(), Progress(state="loading")))
        for pool in POOLS[: request.pools]:
            yield cluster_pb2.LoadResponse(pool=wire.fill(cluster_pb2.Pool(), pool))

    async def Unload(self, request, _context):  # noqa: N802 - gRPC's name
        return cluster_pb2.UnloadResponse(instance_ids=["tiny-0"] if request.model == MODEL else [])

    async def Cordon(self, request, _context):  # noqa: N802 - gRPC's name
        self.asked.append(("cordon", request.node_id))
        return cluster_pb2.CordonResponse()

    async def Uncordon(self, request, _context):  # noqa: N802 - gRPC's name
        self.asked.append(("uncordon", request.node_id))
        return cluster_pb2.UncordonResponse()

    async def Drain(self, request, _context):  # noqa: N802 - gRPC's name
        """Node `stuck` is never empty."""
        response = cluster_pb2.DrainResponse()
        wire.fill(response.left.add(), POOLS[0])
        yield response
        if request.node_id == "stuck":
            await asyncio.Event().wait()
        yield cluster_pb2.DrainResponse()

    async def TailPoolLog(self, request, _context):  # noqa: N802 - gRPC's name
        for at in range(request.lines):
            yield cluster_pb2.TailPoolLogResponse(lines=[f"line {at}"])

    async def Chat(self, request, context):  # noqa: N802 - gRPC's name
        self.asked.append(request)
        if request.model == "nope":
            await refusal_abort(context, UNKNOWN)
        yield inference_pb2.ChatResponse(
            progress=wire.fill(inference_pb2.Progress(), Progress(state="loading", percent=50))
        )
        for text in ("Hello", ", ", "world"):
            yield inference_pb2.ChatResponse(piece=wire.fill(inference_pb2.Piece(), Piece(text=text)))
            if request.model == "dies":
                await refusal_abort(context, DEAD)

    async def Complete(self, request, _context):  # noqa: N802 - gRPC's name
        self.asked.append(request)
        yield inference_pb2.CompleteResponse(piece=wire.fill(inference_pb2.Piece(), Piece(text=request.prompt + "!\n")))


@asynccontextmanager
async def fake_head() -> AsyncIterator[tuple[FakeHead, str]]:
    """A running one, and its address."""
    servicer, server = FakeHead(), new_server()
    cluster_pb2_grpc.add_ClusterServiceServicer_to_server(servicer, server)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield servicer, f"127.0.0.1:{port}"
    finally:
        await server.stop(0)
