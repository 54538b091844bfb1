"""One model in several pools: real heads, agents and engines."""

import asyncio
from contextlib import AsyncExitStack

import aiohttp
import pytest
from sollol.report import InstanceState

from tests.e2e.cluster import RECITAL_20, chat_body, text_of
from tests.e2e.daemons import neighbouring
from tests.e2e.models import RANDOM, RECITER
from tests.waiting import wait_until

pytestmark = pytest.mark.engine
LONG = 4000  # tokens: about ten seconds
KEY = "a-key-for-tools"

CONFIG = f"""
[models.default]
pools = 2

[models."{RANDOM}"]
parallel = 1
context_per_slot = 8192

[models."{RECITER}"]
parallel = 1
"""


@pytest.fixture
async def cluster(by_hand):
    """One head and two agents."""
    (by_hand.home / "head.toml").write_text(CONFIG)
    by_hand.start_head("--config", str(by_hand.home / "head.toml"))
    for node in ("a", "b"):
        by_hand.start_agent(node)
    await by_hand.nodes_seen(2)
    return by_hand


async def begun(stack, cluster):
    """A long stream that has had its first token; closing the stack ends it."""
    events = await stack.enter_async_context(cluster.stream(RANDOM, max_tokens=LONG))
    async for event in events:
        if text_of(event):
            return events
    raise AssertionError("it ended before the first token")


async def ready(cluster, model):
    pools = [pool for pool in await cluster.pools(model) if pool.instance.state is InstanceState.READY]
    return sorted(pools, key=lambda pool: pool.instance.pool_number)


async def ready_and_streaming(cluster, model, numbers):
    """Its pools once they are these, each with a stream; agents' reports reach the head a moment after a token."""

    async def seen():
        pools = await ready(cluster, model)
        told = [(pool.instance.pool_number, pool.instance.active_streams) for pool in pools]
        return pools if told == [(number, 1) for number in numbers] else None

    return await wait_until(seen, within_s=20, what=f"pools {numbers} are ready, each with one stream")


async def generating(cluster, pools):
    return [await cluster.busy_slots(pool) for pool in pools]


async def test_two_long_streams_run_on_two_pools_and_the_least_busy_one_gets_the_next(cluster):
    async with AsyncExitStack() as first:
        await begun(first, cluster)
        await ready_and_streaming(cluster, RANDOM, [0])
        async with AsyncExitStack() as second:
            await begun(second, cluster)
            pools = await ready_and_streaming(cluster, RANDOM, [0, 1])
            assert await generating(cluster, pools) == [1, 1], "at the same time"

            third = asyncio.create_task(cluster.say(RANDOM, max_tokens=3))
            status, out, _ = await cluster.cli("pools")
            assert status == 0
            assert out.count("1 / 0") == 2
            assert not third.done(), "it waits: two pools are the limit"

        assert await asyncio.wait_for(third, 30)
        assert await generating(cluster, pools) == [1, 0], "the second stream's pool took it"
        assert len(await cluster.pools(RANDOM)) == 2
    events = cluster.log("head")
    assert events.count('"event":"pool_ready"') == 2
    assert '"wanted_for":"REQUESTS"' in events


async def three_ready(cluster):
    async def seen():
        pools = await ready(cluster, RANDOM)
        return pools if len(pools) == 3 else None

    return await wait_until(seen, within_s=20, what="three pools are reported ready")


async def test_an_operator_brings_up_pools_and_stops_them_all(cluster):
    status, out, err = await cluster.cli("load", RANDOM, "--pools", "3")

    assert (status, err) == (0, "")
    pools = await three_ready(cluster)
    assert [line.split(": ")[1][:6] for line in out.splitlines()] == ["pool 0", "pool 1", "pool 2"]
    assert {pool.instance.instance_id for pool in pools} == {line.split()[-1] for line in out.splitlines()}
    status, out, _ = await cluster.cli("unload", RANDOM)
    assert (status, out.count(RANDOM)) == (0, 3)
    await cluster.nothing_is_reserved()


async def said(url, session):
    async with session.post(f"{url}/v1/chat/completions", json=chat_body(RECITER)) as response:
        answer = await response.json()
        assert response.status == 200, answer
        return answer["choices"][0]["message"]["content"]


async def test_two_heads_with_one_cold_model_bring_up_as_many_pools_as_wanted(cluster):
    other = cluster.start_another_head("head2", "--config", str(cluster.home / "head.toml"))
    await wait_until(
        lambda: cluster.log("head2").count("node_connected") >= 2, within_s=60, what="the other head sees both nodes"
    )

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        answers = await asyncio.gather(*(said(url, session) for url in (cluster.url, other) * 6))

    assert set(answers) == {RECITAL_20}
    await cluster.only_ready_pools_are_reserved()
    numbers = [pool.instance.pool_number for pool in await ready(cluster, RECITER)]
    assert numbers in ([0], [0, 1])


async def fetched(url, key=""):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with aiohttp.ClientSession() as session, session.get(f"{url}/v1/models", headers=headers) as response:
        return response.status, await response.json()


async def test_with_coordinator_listen_tcp_people_reach_each_pool_on_a_port_and_the_head_goes_on_as_before(
    by_hand, ports
):
    (by_hand.home / "head.toml").write_text(CONFIG)
    (by_hand.home / "key").write_text(f"{KEY}\n")
    first = neighbouring(ports, 4)
    by_hand.start_head("--config", str(by_hand.home / "head.toml"))
    listen = ("--coordinator-listen", "tcp", "--coordinator-port", str(first))
    by_hand.start_agent("a", *listen, "--coordinator-key-file", str(by_hand.home / "key"))
    await by_hand.nodes_seen(1)

    status, out, err = await by_hand.cli("load", RECITER, "--pools", "2")
    assert (status, err, out.count("is ready on a")) == (0, "", 2)

    pools = await ready(by_hand, RECITER)
    assert [pool.instance.endpoint for pool in pools] == [f"http://127.0.0.1:{first + at}" for at in (0, 1)]
    for pool in pools:
        assert (await fetched(pool.instance.endpoint))[0] == 401
        code, models = await fetched(pool.instance.endpoint, KEY)
        assert (code, models["data"][0]["id"]) == (200, RECITER)
    assert await by_hand.say(RECITER) == RECITAL_20
    _, out, _ = await by_hand.cli("pools")
    assert f"http://127.0.0.1:{first + 1}" in out
    for name in ("a", "head"):
        assert KEY not in by_hand.log(name)
