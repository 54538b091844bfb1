"""Cordon and drain over real daemons and the real engine, through restarts of both daemons."""

import asyncio
import json

import pytest
from sollol.report import InstanceState

from tests.e2e.cluster import RECITAL_20, chat_body, text_of
from tests.e2e.models import RANDOM, RECITER
from tests.waiting import wait_until

pytestmark = pytest.mark.engine
LONG = 4000
LONG_THROUGH_A_BACKEND = 2000  # tokens: each costs several times as much


@pytest.fixture
async def cluster(by_hand):
    """Two nodes, and RANDOM warm on one of them."""
    for node in ("a", "b"):
        by_hand.start_agent(node)
    by_hand.start_head()
    await by_hand.nodes_seen(2)
    await by_hand.say(RANDOM)
    return by_hand


def other_than(node):
    return "b" if node == "a" else "a"


async def states(cluster):
    """What `sollol nodes` shows of each."""
    status, out, err = await cluster.cli("nodes")
    assert status == 0, err
    return {line.split()[0]: line for line in out.splitlines()[1:]}


async def cordoned(cluster):
    async with cluster.client() as client:
        return {node.report.node_id: (node.report.cordoned, node.report.draining) for node in await client.nodes()}


async def long_stream(cluster, begun, tokens=LONG):
    async with cluster.stream(RANDOM, max_tokens=tokens) as events:
        seen = []
        async for event in events:
            seen.append(event)
            begun.set()
    return seen


async def test_a_drain_lets_a_stream_end_sends_others_elsewhere_and_holds_through_restarts(cluster):
    before = await cluster.ready_pool(RANDOM)
    node = before.node_id
    begun = asyncio.Event()
    running = asyncio.create_task(long_stream(cluster, begun))
    await asyncio.wait_for(begun.wait(), 20)

    drain = asyncio.create_task(cluster.cli("drain", node, "--timeout", "60", within_s=90))

    await wait_until(lambda: drains(cluster, node), what="the node is reported draining")
    assert await cluster.say(RANDOM, max_tokens=5)
    elsewhere = [pool for pool in await cluster.pools(RANDOM) if pool.instance.state is InstanceState.READY]
    assert other_than(node) in [pool.node_id for pool in elsewhere]
    assert not running.done()
    assert not drain.done()

    events = await running
    assert events[-1] == {"done": True}
    assert [event["choices"][0]["finish_reason"] for event in events if event.get("choices")][-1] == "length"
    assert sum(bool(text_of(event)) for event in events) > LONG / 2
    status, _, err = await drain
    assert (status, f"{node} is empty" in err) == (0, True), err
    assert [pool.node_id for pool in await cluster.pools(RANDOM)] == [other_than(node)]
    assert "drained" in (await states(cluster))[node]

    for name, start in ((node, lambda: cluster.start_agent(node)), ("head", cluster.start_head)):
        cluster.processes[name].kill()
        cluster.processes[name].wait()
        start()
        await cluster.nodes_seen(2)
    assert (await cordoned(cluster))[node] == (True, True)
    assert await cluster.say(RECITER) == RECITAL_20
    assert (await cluster.ready_pool(RECITER)).node_id == other_than(node)

    assert (await cluster.cli("uncordon", node))[0] == 0
    await wait_until(lambda: free(cluster, node), what="the node takes pools again")


async def drains(cluster, node):
    return (await cordoned(cluster))[node] == (True, True)


async def free(cluster, node):
    return (await cordoned(cluster))[node] == (False, False)


async def test_a_cordoned_node_goes_on_serving_takes_no_new_pool_and_says_why(cluster):
    status, _, err = await cluster.cli("cordon", "attic")
    assert (status, "node attic is not known" in err) == (3, True)
    node = (await cluster.ready_pool(RANDOM)).node_id
    for each in ("a", "b"):
        assert (await cluster.cli("cordon", each))[0] == 0

    async def both():
        return set((await cordoned(cluster)).values()) == {(True, False)}

    await wait_until(both, what="both are reported cordoned")
    assert "cordoned" in (await states(cluster))[node]
    assert await cluster.say(RANDOM, max_tokens=5)
    status, answer = await cluster.post("/v1/chat/completions", chat_body(RECITER))
    assert (status, answer["error"]["code"]) == (503, "NO_FIT")
    _, out, _ = await cluster.cli("place", RECITER, "--json")
    assert {verdict["refusal"]["reason"] for verdict in json.loads(out)["nodes"]} == {"CORDONED"}

    assert (await cluster.cli("uncordon", other_than(node)))[0] == 0
    await wait_until(lambda: free(cluster, other_than(node)), what="one node takes pools again")
    assert await cluster.say(RECITER) == RECITAL_20
    assert (await cluster.ready_pool(RECITER)).node_id == other_than(node)


async def test_draining_a_lender_lets_the_pool_it_lends_to_end_its_stream_first(by_hand):
    for node in ("a", "b"):
        by_hand.start_agent(node)
    by_hand.start_head()
    await by_hand.nodes_seen(2)
    status, _, err = await by_hand.cli("load", RANDOM, "--backends-per-pool", "1")
    assert status == 0, err
    pool = await by_hand.ready_pool(RANDOM)
    lender = next(share.node_id for share in pool.instance.shares if share.node_id and share.layers)
    begun = asyncio.Event()
    running = asyncio.create_task(long_stream(by_hand, begun, LONG_THROUGH_A_BACKEND))
    await asyncio.wait_for(begun.wait(), 20)

    drain = asyncio.create_task(by_hand.cli("drain", lender, "--timeout", "60", within_s=90))
    await wait_until(lambda: drains(by_hand, lender), within_s=10, what="the lender is reported draining")
    assert not running.done()
    events = await running
    status, _, err = await drain

    assert (status, events[-1]) == (0, {"done": True}), err
    assert await by_hand.pools(RANDOM) == []
    assert await by_hand.say(RANDOM, max_tokens=5)
    (after,) = await by_hand.pools(RANDOM)
    assert {share.node_id for share in after.instance.shares} <= {"", other_than(lender)}
