"""gRPC's health service says what `/readyz` says, also when readiness ends because nobody says anything more."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sollol.channels import open_channel

from sollold import server as module
from sollold.catalogue import Catalogue
from sollold.front.grpc import InferenceService
from sollold.operators import ClusterService
from sollold.server import HeadServer
from tests.fakes.fake_keys import OPEN
from tests.fakes.fake_metrics import counting
from tests.waiting import wait_until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Cluster:
    """Nodes of which some are live, as a test says."""

    models_version = 0
    live = False

    def statuses(self):
        return ()

    def any_live(self, stale_after_s):
        return self.live


@pytest.fixture
def cluster():
    return Cluster()


@asynccontextmanager
async def serving(cluster, port):
    catalogue = Catalogue(cluster, stale_after_s=8.0)
    inference = InferenceService(None, catalogue, OPEN, counting())
    operators = ClusterService(cluster, None, catalogue, decide=None)
    server = HeadServer(inference, operators, is_ready=catalogue.ready, peer_refused=lambda _: None)
    await server.listen(f"127.0.0.1:{port}")
    following = asyncio.create_task(server.follow())
    try:
        async with open_channel(f"127.0.0.1:{port}") as channel:
            yield server, health_pb2_grpc.HealthStub(channel)
    finally:
        following.cancel()
        await asyncio.wait({following})
        await server.stop(0)


async def becomes(stub, status):
    async def is_so():
        return (await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)).status == status

    await wait_until(is_so, what=f"health is {status}")


async def test_health_follows_readiness_when_a_node_comes_and_without_any_news_when_the_last_one_is_stale(
    cluster, ports, monkeypatch
):
    monkeypatch.setattr(module, "LOOK_AGAIN_S", 0.05)
    async with serving(cluster, ports()) as (server, stub):
        await becomes(stub, NOT_SERVING)
        cluster.live = True
        server.on_nodes_changed()
        await becomes(stub, SERVING)

        cluster.live = False

        await becomes(stub, NOT_SERVING)


async def test_news_of_a_node_are_not_waited_for(cluster, ports, monkeypatch):
    monkeypatch.setattr(module, "LOOK_AGAIN_S", 3600.0)
    async with serving(cluster, ports()) as (server, stub):
        cluster.live = True
        server.on_nodes_changed()

        await becomes(stub, SERVING)


async def test_a_head_that_drains_never_serves_again(cluster, ports, monkeypatch):
    monkeypatch.setattr(module, "LOOK_AGAIN_S", 0.05)
    async with serving(cluster, ports()) as (server, stub):
        await server.drain()
        cluster.live = True
        server.on_nodes_changed()
        await wait_until(lambda: server._told, what="it has looked")

        await becomes(stub, NOT_SERVING)
