"""Daemons that die and come back one by one, under requests."""

import asyncio
import json
import os
import signal

import aiohttp
import psutil
import pytest
from sollol.errors import Reason

from tests.e2e.cluster import RECITAL_20, chat_body, text_of
from tests.e2e.daemons import gone
from tests.e2e.models import RANDOM, RECITER
from tests.notice_board import reports
from tests.waiting import wait_until

pytestmark = pytest.mark.engine
LONG = 4000


@pytest.fixture
async def cluster(by_hand):
    """One head and one agent, each the test's to kill."""
    by_hand.start_agent("node")
    by_hand.start_head()
    await by_hand.nodes_seen(1)
    return by_hand


async def reading(cluster, tokens=LONG):
    """A stream in its middle: a task whose result is the number of texts and the last event."""
    begun = asyncio.Event()

    async def read():
        texts, last = 0, {}
        async with cluster.stream(RANDOM, max_tokens=tokens) as events:
            async for event in events:
                last = event
                if text_of(event):
                    texts += 1
                    begun.set()
        return texts, last

    task = asyncio.create_task(read())
    await asyncio.wait_for(begun.wait(), 20)
    return task


async def test_a_killed_agent_is_noticed_and_started_again_it_serves_with_the_engine_that_ran_on(cluster):
    task = await reading(cluster)
    before, reserved = await cluster.ready_pool(RANDOM), await cluster.reserved()

    cluster.processes["node"].kill()
    cluster.processes["node"].wait()

    _, last = await asyncio.wait_for(task, 5)
    assert last["error"]["code"] == Reason.AGENT_UNREACHABLE
    await cluster.nodes_seen(0)
    status, out, _ = await cluster.cli("nodes", "--json")
    assert status == 0
    assert [node["connected"] for node in json.loads(out)["nodes"]] == [False]

    cluster.start_agent("node")

    await cluster.nodes_seen(1)
    after = await cluster.ready_pool(RANDOM)
    assert (after.instance.instance_id, after.instance.pid) == (before.instance.instance_id, before.instance.pid)
    assert await cluster.reserved() == reserved
    await wait_until(lambda: is_free(cluster, after), within_s=1, what="the slot of the lost stream is free")
    assert await cluster.say(RANDOM)
    assert len(await cluster.pools(RANDOM)) == 1
    assert await cluster.say(RECITER) == RECITAL_20
    await cluster.only_ready_pools_are_reserved()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_a_request_that_meets_a_restarting_agent_is_served_warm_by_the_same_engine(by_hand, number):
    """With another node beside it that could load the model: nothing is loaded a second time."""
    by_hand.start_agent("node", "--leave-engines")
    by_hand.start_head()
    await by_hand.nodes_seen(1)
    task = await reading(by_hand)
    before = await by_hand.ready_pool(RANDOM)
    by_hand.start_agent("other")
    await by_hand.nodes_seen(2)

    by_hand.processes["node"].send_signal(number)
    await asyncio.to_thread(by_hand.processes["node"].wait, 20)
    by_hand.start_agent("node")

    _, last = await asyncio.wait_for(task, 5)
    word = Reason.AGENT_RESTARTING if number is signal.SIGTERM else Reason.AGENT_UNREACHABLE
    assert (last["error"]["code"], last["error"]["retry"]) == (word, "RETRYABLE")
    assert await asyncio.wait_for(by_hand.say(RANDOM), 20)
    after = await by_hand.ready_pool(RANDOM)
    assert (after.instance.instance_id, after.instance.pid) == (before.instance.instance_id, before.instance.pid)
    assert len(await by_hand.pools(RANDOM)) == 1
    assert by_hand.log("head").count("pool_starting") == 1


async def test_requests_while_the_only_agent_is_away_are_told_so_in_time(cluster):
    await cluster.say(RECITER)
    engine = psutil.Process((await cluster.ready_pool(RECITER)).instance.pid)
    cluster.processes["node"].kill()
    cluster.processes["node"].wait()

    try:
        status, answer = await asyncio.wait_for(cluster.post("/v1/completions", {"model": RECITER, "prompt": "x"}), 20)

        assert status == 503, answer
        assert answer["error"]["retry"] == "RETRYABLE"
        assert await cluster.get("/healthz") == 200
    finally:
        engine.kill()  # its agent does not come back in this test


async def test_a_stopped_agent_takes_its_engines_along_and_is_not_listed_any_more(cluster):
    await cluster.say(RECITER)
    engine = psutil.Process((await cluster.ready_pool(RECITER)).instance.pid)

    cluster.processes["node"].terminate()

    assert await asyncio.to_thread(cluster.processes["node"].wait, 20) == 0
    await gone([engine], 2, "its engine has ended before it")
    await cluster.nodes_seen(0)


async def test_a_head_that_is_killed_and_comes_back_uses_the_engines_that_run(cluster):
    await cluster.say(RECITER)
    before = await cluster.ready_pool(RECITER)
    task = await reading(cluster)
    other = await cluster.ready_pool(RANDOM)

    cluster.processes["head"].kill()
    cluster.processes["head"].wait()

    await asyncio.gather(task, return_exceptions=True)  # its connection was cut
    await wait_until(lambda: is_free(cluster, other), within_s=1, what="the slot of the lost head's stream is free")
    cluster.start_head()
    await cluster.nodes_seen(1)
    assert await cluster.say(RECITER) == RECITAL_20
    after = await cluster.ready_pool(RECITER)
    assert (after.instance.instance_id, after.instance.pid) == (before.instance.instance_id, before.instance.pid)


async def test_a_new_head_serves_warm_without_the_old_one_and_without_redis(cluster):
    assert await cluster.say(RECITER) == RECITAL_20
    before, reserved = await cluster.ready_pool(RECITER), await cluster.reserved()
    for name in ("head", "redis"):
        cluster.processes[name].kill()
        cluster.processes[name].wait()

    url = cluster.start_another_head("next")

    async def answered():
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.post(f"{url}/v1/chat/completions", json=chat_body(RECITER)) as response,
            ):
                return (await response.json())["choices"][0]["message"]["content"]
        except (aiohttp.ClientError, KeyError):
            return ""

    assert await wait_until(answered, within_s=5, what="the new head answers") == RECITAL_20
    assert "pool_starting" not in cluster.log("next")
    cluster.start_head()
    await cluster.nodes_seen(1)
    after = await cluster.ready_pool(RECITER)
    assert (after.instance.instance_id, after.instance.pid) == (before.instance.instance_id, before.instance.pid)
    assert await cluster.reserved() == reserved


async def is_free(cluster, pool):
    return await cluster.busy_slots(pool) == 0


async def test_losing_redis_ends_no_stream_and_hides_no_known_node(cluster):
    task = await reading(cluster, tokens=800)

    cluster.processes["redis"].kill()
    cluster.processes["redis"].wait()

    assert await cluster.say(RECITER) == RECITAL_20  # a cold model: placed, started and answered without Redis
    assert await task == (800, {"done": True})
    assert await cluster.get("/readyz") == 200
    await wait_until(
        lambda: "registry_lost" in cluster.log("head"), within_s=30, what="the head says that Redis is gone"
    )
    await cluster.nodes_seen(1)

    cluster.start_redis()
    await wait_until(lambda: is_published(cluster), within_s=30, what="the node is published again")


def is_published(cluster):
    return [report.node_id for report in reports(cluster.redis_url)] == ["node"]


async def test_a_frozen_redis_delays_no_request(cluster):
    await cluster.say(RECITER)
    os.kill(cluster.processes["redis"].pid, signal.SIGSTOP)
    try:
        asked = [cluster.say(RECITER) for _ in range(20)]
        assert await asyncio.wait_for(asyncio.gather(*asked), 15) == [RECITAL_20] * 20
        assert await asyncio.wait_for(cluster.say(RANDOM), 20)
    finally:
        os.kill(cluster.processes["redis"].pid, signal.SIGCONT)
