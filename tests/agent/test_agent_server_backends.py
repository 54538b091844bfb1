"""Backends as an agent lends them over gRPC."""

import pytest
from sollol.errors import Reason, refuse

from tests.agent_service import lend, reason, reserve


async def test_a_backend_lends_what_its_pool_reserved(node, stub):
    await reserve(stub)
    response = await lend(stub, coordinator_node="b", pool_secret=bytes(32))
    assert (response.endpoint.host, response.endpoint.port, list(response.endpoint.device_ids)) == (
        "127.0.0.1",
        7500,
        ["CPU"],
    )
    (wish,) = node.supervisor.wishes
    assert (wish.coordinator_node, wish.pool_secret) == ("b", bytes(32))
    assert (wish.pool_id, wish.bytes, wish.threads, wish.allowed_hosts) == ("p1", {"CPU": 100}, 2, ("10.0.0.1",))
    assert node.ledger.bound == {"p1"}


@pytest.mark.parametrize("devices", [["CPU"], ["CPU", "CUDA0"]])
async def test_a_backend_lends_nothing_that_is_not_reserved_and_a_reservation_is_kept(node, stub, devices):
    held = {} if devices == ["CPU"] else {"p1": {"CPU": 100}}
    if held:
        await reserve(stub)
    assert reason((await lend(stub, device_ids=devices)).refusal) == "RESERVATION_MISSING"
    assert (node.supervisor.wishes, node.ledger.held) == ([], held)


async def test_a_backend_that_does_not_come_up_gives_its_bytes_back(node, stub):
    node.supervisor.fail_with = refuse(Reason.PORT_TAKEN, "all taken", retryable=True)
    await reserve(stub)
    assert reason((await lend(stub)).refusal) == "PORT_TAKEN"
    assert node.ledger.held == {}


@pytest.mark.parametrize(
    "wrong",
    [
        {"pool_id": "../p"},
        {"pool_id": "p1.backend"},
        {"device_ids": []},
        {"device_ids": ["CPU", "CPU"]},
        {"device_ids": ["-H"]},
        {"device_ids": ["a,b"]},
        {"threads": 5000},
        {"allowed_hosts": []},
        {"allowed_hosts": ["a,b"]},
        {"allowed_hosts": ["--listen"]},
        {"allowed_hosts": ["x"] * 17},
        {"attach_within_s": 0},
        {"attach_within_s": float("nan")},
        {"attach_within_s": 601},
        {"coordinator_node": "x" * 256},
        {"coordinator_node": "b", "pool_secret": b"short"},
        {"pool_secret": bytes(32)},
    ],
)
async def test_backends_out_of_range_are_refused(node, stub, wrong):
    await reserve(stub)
    assert reason((await lend(stub, **wrong)).refusal) == "INVALID_REQUEST"
    assert node.supervisor.wishes == []
