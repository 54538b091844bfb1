"""Coordinators as an agent starts, shows and stops them over gRPC."""

import grpc.aio
import msgspec
import pytest
from sollol.channels import refusal_of
from sollol.errors import Reason, refuse
from sollol.report import BackendEndpoint, DeviceShare, InstanceState
from sollol.v1 import agent_pb2

from tests.agent_service import PLAN, reason, reserve, start, status_of

TUNNELLED = BackendEndpoint(node_id="b", host="10.0.0.2", port=7501, device_ids=("CPU",), tunnelled=True)


async def test_what_is_to_stop_when_idle_runs_on_while_it_has_streams(node, stub):
    await reserve(stub)
    await start(stub)
    request = agent_pb2.StopRequest(instance_id="p1", when_idle=True)
    node.active["p1"] = 1
    assert (await stub.Stop(request)).busy
    assert "p1" in node.supervisor.running
    node.active.clear()
    assert not (await stub.Stop(request)).busy
    assert node.supervisor.running == {}


async def test_a_coordinator_starts_on_its_reservation(node, stub):
    await reserve(stub)
    response = await start(stub)
    assert response.instance.instance_id == "p1"
    assert node.supervisor.starts == [PLAN]
    assert node.ledger.bound == {"p1"}


async def test_starting_again_leaves_the_instance_as_it_is(node, stub):
    await reserve(stub)
    assert (await start(stub)).instance == (await start(stub)).instance
    assert len(node.supervisor.starts) == 1


async def test_nothing_starts_without_a_reservation(node, stub):
    assert reason((await start(stub)).refusal) == "RESERVATION_MISSING"
    assert node.supervisor.starts == []


async def test_a_plan_larger_than_its_reservation_is_refused_and_the_reservation_kept(node, stub):
    await reserve(stub, size=99)
    response = await start(stub)
    assert reason(response.refusal) == "RESERVATION_MISSING"
    assert dict(response.refusal.numbers) == {"needed_bytes": 100, "reserved_bytes": 99}
    assert (node.ledger.held, node.ledger.bound) == ({"p1": {"CPU": 99}}, set())


async def test_a_start_that_fails_gives_its_bytes_back(node, stub):
    node.supervisor.fail_with = refuse(Reason.BACKING_OFF, "died twice", retryable=True)
    await reserve(stub)
    assert reason((await start(stub)).refusal) == "BACKING_OFF"
    assert node.ledger.held == {}


@pytest.mark.parametrize("state", [InstanceState.STOPPING, InstanceState.LOST])
async def test_a_start_refused_while_the_old_process_is_still_there_keeps_its_bytes(node, stub, state):
    await reserve(stub)
    await start(stub)
    node.supervisor.running["p1"] = msgspec.structs.replace(node.supervisor.running["p1"], state=state)
    node.supervisor.fail_with = refuse(Reason.INSTANCE_NOT_READY, "just stopping", retryable=True)
    assert reason((await start(stub)).refusal) == "INSTANCE_NOT_READY"
    assert "p1" in node.ledger.held


@pytest.mark.parametrize(
    "wrong",
    [
        {"parallel": 0},
        {"parallel": 1025},
        {"context_per_slot": 0},
        {"batch": 128, "ubatch": 256},
        {"threads": 5000},
        {"pool_number": 1024},
        {"pool_secret": bytes(32)},
        {"backends": (TUNNELLED,)},
        {"backends": (TUNNELLED,), "pool_secret": b"short"},
        {"kv_type": "f16 --rpc evil"},
        {"shares": ()},
        {"shares": PLAN.shares * 2},
        {"shares": (msgspec.structs.replace(PLAN.shares[0], total_bytes=1),)},
        {"shares": (msgspec.structs.replace(PLAN.shares[0], device_id="--rpc"),)},
        {"shares": (msgspec.structs.replace(PLAN.shares[0], device_id="a b"),)},
    ],
)
async def test_plans_out_of_range_are_refused(node, stub, wrong):
    await reserve(stub)
    response = await start(stub, msgspec.structs.replace(PLAN, **wrong))
    assert reason(response.refusal) == "INVALID_REQUEST"
    assert node.supervisor.starts == []


async def test_model_names_that_are_paths_are_refused(node, stub):
    await reserve(stub)
    response = await start(stub, msgspec.structs.replace(PLAN, model="../../etc/passwd"))
    assert reason(response.refusal) == "INVALID_MODEL_NAME"


SPLIT = msgspec.structs.replace(
    PLAN,
    shares=(
        DeviceShare(device_id="CPU", layers=0, margin_bytes=40, total_bytes=40),
        DeviceShare(device_id="CPU", layers=3, node_id="n1", margin_bytes=60, total_bytes=60),
        DeviceShare(device_id="CPU", layers=5, node_id="n2", margin_bytes=5000, total_bytes=5000),
    ),
    backends=(
        BackendEndpoint(node_id="n1", host="127.0.0.1", port=7500, device_ids=("CPU",)),
        BackendEndpoint(node_id="n2", host="10.0.0.2", port=7500, device_ids=("CPU",)),
    ),
)


async def test_of_a_plan_over_several_nodes_only_this_nodes_part_must_be_reserved(node, stub):
    await reserve(stub, size=99)
    response = await start(stub, SPLIT)
    assert dict(response.refusal.numbers) == {"needed_bytes": 100, "reserved_bytes": 99}
    await reserve(stub, size=100)
    assert (await start(stub, SPLIT)).instance.instance_id == "p1"
    assert node.supervisor.starts == [SPLIT]


@pytest.mark.parametrize("wrong", [{"host": "a:1,b"}, {"host": ""}, {"port": 0}, {"port": 70_000}, {"device_ids": ()}])
async def test_endpoints_that_cannot_be_are_refused(node, stub, wrong):
    await reserve(stub)
    endpoint = msgspec.structs.replace(SPLIT.backends[0], **wrong)
    response = await start(stub, msgspec.structs.replace(SPLIT, backends=(endpoint,)))
    assert reason(response.refusal) == "INVALID_REQUEST"


async def test_watching_an_instance_ends_when_it_settled(stub):
    await reserve(stub)
    await start(stub)
    call = stub.WatchInstance(agent_pb2.WatchInstanceRequest(instance_id="p1"))
    assert [message.instance.percent async for message in call] == [0.0, 50.0, 100.0]


async def test_watching_nothing_is_not_found(stub):
    error = await status_of(stub.WatchInstance(agent_pb2.WatchInstanceRequest(instance_id="p1")).read())
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert refusal_of(error).reason is Reason.INSTANCE_NOT_FOUND
