"""Reservations as an agent takes them over gRPC."""

import pytest
from sollol.channels import refusal_of
from sollol.errors import Reason
from sollol.v1 import agent_pb2

from tests.agent_service import reason, reserve, start, status_of


async def test_a_reservation_is_made_and_reported(node, stub):
    assert not (await reserve(stub)).HasField("refusal")
    assert node.ledger.held == {"p1": {"CPU": 100}}
    assert node.reporter.changes == 1


async def test_the_ledgers_refusal_is_a_value(stub):
    response = await reserve(stub, size=2000)
    assert reason(response.refusal) == "MEMORY_SHORT"
    assert dict(response.refusal.numbers) == {"needed_bytes": 1}


@pytest.mark.parametrize(
    "wrong",
    [
        {"pool_id": ""},
        {"pool_id": "x" * 129},
        {"pool_id": "a/b"},
        {"pool_id": "a\n"},
        {"ttl_s": 0.5},
        {"ttl_s": 601},
        {"ttl_s": float("nan")},
        {"size": 1 << 51},
        {"device": "../CPU"},
    ],
)
async def test_reservations_out_of_range_are_refused(node, stub, wrong):
    assert reason((await reserve(stub, **wrong)).refusal) == "INVALID_REQUEST"
    assert node.ledger.held == {}


async def test_a_cordoned_node_takes_no_reservation_until_it_is_uncordoned(node, stub):
    for draining in (False, True):
        await stub.SetCordoned(agent_pb2.SetCordonedRequest(cordoned=True, draining=draining))
        assert reason((await reserve(stub)).refusal) == "CORDONED"
        assert node.cordon.draining is draining
    await stub.SetCordoned(agent_pb2.SetCordonedRequest())
    assert not (await reserve(stub)).HasField("refusal")
    assert node.reporter.changes == 4


async def test_releasing_twice_is_a_success(node, stub):
    await reserve(stub)
    for _ in range(2):
        await stub.Release(agent_pb2.ReleaseRequest(pool_id="p1"))
    assert node.ledger.held == {}


async def test_no_pool_may_be_named_like_a_backend(node, stub):
    assert reason((await reserve(stub, pool_id="p.backend")).refusal) == "INVALID_REQUEST"
    assert reason((await start(stub, pool_id="p.backend")).refusal) == "INVALID_REQUEST"


async def test_stop_also_gives_back_what_was_only_reserved(node, stub):
    await reserve(stub)
    await stub.Stop(agent_pb2.StopRequest(instance_id="p1"))
    assert node.ledger.held == {}
    await stub.Stop(agent_pb2.StopRequest(instance_id="never-seen"))


async def test_ids_out_of_range_are_refused_where_the_answer_has_no_field_for_it(stub):
    error = await status_of(stub.Stop(agent_pb2.StopRequest(instance_id="../x")))
    assert refusal_of(error).reason is Reason.INVALID_REQUEST
