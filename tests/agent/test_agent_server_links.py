"""Links as an agent measures them over gRPC."""

import grpc.aio
import pytest
from sollol import wire
from sollol.channels import refusal_of
from sollol.errors import Reason, refuse
from sollol.link import Link
from sollol.v1 import agent_pb2

from tests.agent_service import reason


@pytest.mark.parametrize("host", ["10.0.0.2", "fd00::2", "big-box.lan"])
async def test_a_link_is_measured_when_a_head_asks_and_reported_soon(node, stub, host):
    response = await stub.MeasureLink(agent_pb2.MeasureLinkRequest(node_id="n2", host=host, port=7462))

    assert wire.value(Link, response.link) == Link(node_id="n2", rtt_s=0.001, bytes_per_s=1e6, boot_id="boot")
    assert node.links.asked == [("n2", host, 7462)]
    assert node.reporter.changes == 1


@pytest.mark.parametrize(
    ("peer", "named"),
    [
        (("", "10.0.0.2", 7462), "node id"),
        (("n" * 256, "10.0.0.2", 7462), "node id"),
        (("n2", "", 7462), "host"),
        (("n2", "-evil", 7462), "host"),
        (("n2", "a b", 7462), "host"),
        (("n2", "10.0.0.2", 0), "port"),
        (("n2", "10.0.0.2", 70000), "port"),
    ],
)
async def test_what_is_no_address_is_not_measured(node, stub, peer, named):
    node_id, host, port = peer
    response = await stub.MeasureLink(agent_pb2.MeasureLinkRequest(node_id=node_id, host=host, port=port))

    assert reason(response.refusal) == "INVALID_REQUEST"
    assert response.refusal.message.startswith(named)
    assert node.links.asked == []


async def test_a_peer_that_refuses_is_a_refusal_and_no_link(node, stub):
    node.links.fail_with = refuse(Reason.STREAM_STALLED, "0 bytes came", retryable=True)
    response = await stub.MeasureLink(agent_pb2.MeasureLinkRequest(node_id="n2", host="10.0.0.2", port=7462))

    assert reason(response.refusal) == "STREAM_STALLED"
    assert not response.HasField("link")


async def test_a_probe_learns_who_answers_and_how_fast_its_bytes_came(stub):
    call = stub.ProbeLink(timeout=10)
    who = await call.read()
    assert (who.node_id, who.bytes_per_s) == ("n1", 0)
    for _ in range(4):
        await call.write(agent_pb2.ProbeLinkRequest(padding=bytes(4096)))
    await call.done_writing()
    assert (await call.read()).bytes_per_s > 0


async def test_a_probe_without_bytes_is_refused(stub):
    call = stub.ProbeLink(timeout=10)
    await call.read()
    await call.done_writing()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call.read()

    assert refusal_of(error.value).reason is Reason.STREAM_STALLED
