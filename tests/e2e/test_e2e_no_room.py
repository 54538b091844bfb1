"""Nodes too small for a model, and ports that are taken."""

import json
import socket
from pathlib import Path

import pytest
from sollol.client import Message, Piece, PlacementWish
from sollol.errors import SURFACES, Reason, SollolError

from tests.e2e.cluster import chat_body
from tests.e2e.models import RECITER
from tests.waiting import wait_until

CAPS = {"small": 40_000_000, "smaller": 20_000_000}


@pytest.fixture
async def small(by_hand):
    """A head and two agents that may use less memory than the model needs."""
    for node, cap in CAPS.items():
        by_hand.start_agent(node, "--caps", f"CPU={cap}")
    by_hand.start_head()
    await by_hand.nodes_seen(len(CAPS))
    return by_hand


@pytest.mark.engine
async def test_a_model_that_fits_nowhere_is_refused_with_what_each_node_lacks_in_bytes(small):
    status, answer = await small.post("/v1/chat/completions", chat_body(RECITER))
    error = answer["error"]
    async with small.client() as client:
        decision = await client.place(PlacementWish(model=RECITER))
        with pytest.raises(SollolError) as caught:
            await anext(event async for event in client.chat(RECITER, [Message("user", "?")]) if type(event) is Piece)
        with pytest.raises(SollolError) as not_loaded:
            await client.load(PlacementWish(model=RECITER))
    ran, _, said = await small.cli("run", RECITER, "?")
    placed, shown, _ = await small.cli("place", RECITER, "--json")

    assert (status, error["code"]) == (503, Reason.NO_FIT)
    assert error["details"]["needed_bytes"] > error["details"]["largest_free_bytes"] == CAPS["small"]
    for verdict in decision.nodes:
        row = next(line for line in error["message"].splitlines() if line.split()[:1] == [verdict.node_id])
        assert f"{verdict.needed_bytes:,}" in row
        assert f"{CAPS[verdict.node_id]:,}" in row
        assert Reason.MEMORY_SHORT in row
        assert verdict.free_bytes == CAPS[verdict.node_id] < verdict.needed_bytes
    assert "largest possible fit: " in error["message"]
    assert Reason.NO_FIT == caught.value.refusal.reason == not_loaded.value.refusal.reason == decision.refusal.reason
    assert error["message"] == caught.value.refusal.message
    assert ran == placed == SURFACES[Reason.NO_FIT].exit_code
    assert said.startswith(f"sollol: NO_FIT: {error['message']}")
    assert {node["node_id"] for node in json.loads(shown)["nodes"]} == set(CAPS)
    assert await small.reserved() == {}
    assert await small.pools(RECITER) == []
    assert await small.get("/healthz") == 200


@pytest.mark.engine
async def test_no_node_at_all_is_refused_as_that_on_every_surface(by_hand):
    by_hand.start_head()
    await wait_until(lambda: '"head_ready"' in by_hand.log("head"), within_s=60, what="the head serves")

    status, answer = await by_hand.post("/v1/chat/completions", chat_body(RECITER))
    ran, _, said = await by_hand.cli("run", RECITER, "?")
    placed, _, _ = await by_hand.cli("place", RECITER)

    assert await by_hand.get("/healthz") == 200
    assert await by_hand.get("/readyz") == 503
    assert (status, answer["error"]["code"]) == (503, Reason.NO_NODES)
    assert (ran, said.split(":")[1]) == (SURFACES[Reason.NO_NODES].exit_code, " NO_NODES")
    assert placed == SURFACES[Reason.NO_NODES].exit_code


@pytest.fixture
def taken(ports):
    """A port that somebody else listens on."""
    with socket.socket() as listening:
        port = ports()
        listening.bind(("127.0.0.1", port))
        listening.listen()
        yield port


@pytest.mark.parametrize("flag", ["--http-port", "--grpc-port"])
async def test_a_head_whose_port_is_taken_ends_with_that_reason(by_hand, taken, flag):
    head = by_hand.start_head(flag, str(taken))

    assert head.wait(30) == SURFACES[Reason.PORT_TAKEN].exit_code
    last = json.loads(by_hand.log("head").splitlines()[-1])
    assert (last["event"], last["reason"]) == ("ended_by_refusal", Reason.PORT_TAKEN)
    assert str(taken) in last["message"]


@pytest.mark.engine
async def test_an_agent_whose_port_is_taken_ends_with_that_reason_and_is_not_listed(by_hand, taken):
    agent = by_hand.start_agent("node", "--port", str(taken))
    by_hand.start_head()

    assert agent.wait(30) == SURFACES[Reason.PORT_TAKEN].exit_code
    last = json.loads(by_hand.log("node").splitlines()[-1])
    assert (last["event"], last["reason"]) == ("ended_by_refusal", Reason.PORT_TAKEN)
    assert str(taken) in last["message"]
    by_hand.start_agent("other")
    await by_hand.nodes_seen(1)
    async with by_hand.client() as client:
        assert [node.report.node_id for node in await client.nodes()] == ["other"]


@pytest.mark.engine
async def test_a_second_agent_on_the_same_state_is_turned_away_and_the_first_serves_on(by_hand, ports):
    by_hand.start_agent("node")
    by_hand.start_head()
    await by_hand.nodes_seen(1)
    first = by_hand.processes["node"]

    second = by_hand.start_agent("node", "--port", str(ports()))

    assert second.wait(30) == SURFACES[Reason.PORT_TAKEN].exit_code
    by_hand.processes["first"] = first
    assert await by_hand.say(RECITER)


@pytest.mark.engine
async def test_an_agent_whose_configured_engine_is_not_there_says_so_and_ends(by_hand):
    agent = by_hand.start_agent("node", "--engine", str(Path("/no/such/llama-server")))

    assert agent.wait(30) == SURFACES[Reason.ENGINE_MISSING].exit_code
    assert json.loads(by_hand.log("node").splitlines()[-1])["reason"] == Reason.ENGINE_MISSING
