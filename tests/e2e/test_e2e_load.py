"""Many requests for a cold model, and clients that leave before their answer is complete."""

import asyncio
import json
from collections import Counter
from contextlib import AsyncExitStack, aclosing

import aiohttp
import grpc
import pytest
from redis import Redis
from sollol.channels import open_channel
from sollol.inference import Message, Progress, Sampling
from sollol.report import PlacementWish
from sollol.v1 import inference_pb2, inference_pb2_grpc

from tests.e2e.cluster import RECITAL_20, chat_body, text_of
from tests.e2e.models import COLD, LOADED, RANDOM, RECITER
from tests.fakes.fake_metrics import families, samples
from tests.waiting import wait_until

pytestmark = pytest.mark.engine
REQUESTS = 200
FREE_WITHIN_S = 1.0
LONG = 4000  # tokens: about ten seconds
QUEUED = 4


def starts_in_logs(cluster, model):
    """How often any agent has seen an engine of the model become ready."""
    lines = [line for log in (cluster.state / "log").glob("node-*.log") for line in log.read_text().splitlines()]
    events = [json.loads(line) for line in lines if line.startswith("{")]
    return sum(event["event"] == "coordinator_ready" and event["model"] == model for event in events)


def decisions(cluster, model):
    with Redis(unix_socket_path=str(cluster.redis_socket), decode_responses=True) as redis:
        entries = [fields for _, fields in redis.xrange("sollol:events")]
    return sum(entry["kind"] == "decision" and json.loads(entry["payload"])["model"] == model for entry in entries)


async def streamed(cluster, model):
    text, last = [], None
    async with cluster.stream(model) as events:
        async for event in events:
            text.append(text_of(event))
            last = event
    assert last == {"done": True}
    return "".join(text)


async def test_200_requests_for_a_cold_model_start_one_engine_and_all_get_the_whole_answer(cluster):
    asked = [streamed(cluster, COLD) if at % 2 else cluster.say(COLD) for at in range(REQUESTS)]

    answers = Counter(await asyncio.gather(*asked))

    assert answers == {RECITAL_20: REQUESTS}
    assert len(await cluster.pools(COLD)) == 1
    assert starts_in_logs(cluster, COLD) == 1
    assert decisions(cluster, COLD) == 1
    assert len(list(cluster.state.glob(f"log/*-engines/{COLD}-*.log"))) == 1
    await cluster.only_ready_pools_are_reserved()


async def test_loading_and_asking_for_a_cold_model_at_once_start_one_engine(cluster):
    async with cluster.client() as client:
        loads = [asyncio.create_task(client.load(PlacementWish(model=LOADED))) for _ in range(5)]
        await wait_until(lambda: cluster.pools(LOADED), within_s=20, what="an operator's load has begun")
        texts = await asyncio.gather(*(cluster.say(LOADED) for _ in range(5)))
        pools = await asyncio.gather(*loads)

    assert len({pool.instance.instance_id for pool in pools}) == 1
    assert texts == [RECITAL_20] * 5
    assert starts_in_logs(cluster, LOADED) == 1


async def busy(cluster, pool):
    await wait_until(lambda: cluster.busy_slots(pool), within_s=20, what="the engine generates")


async def free(cluster, pool):
    await wait_until(
        lambda: _no_slot_is_busy(cluster, pool), within_s=FREE_WITHIN_S, what="the slot of the client that left is free"
    )


async def _no_slot_is_busy(cluster, pool):
    return await cluster.busy_slots(pool) == 0


async def warm(cluster):
    await cluster.say(RANDOM)
    return await cluster.ready_pool(RANDOM)


@pytest.mark.parametrize("abrupt", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
async def test_a_client_that_leaves_in_the_middle_frees_its_slot_within_a_second(cluster, stream, abrupt):
    pool = await warm(cluster)
    body = json.dumps(chat_body(RANDOM, max_tokens=LONG, stream=stream)).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", cluster.http_port)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )
    if stream:
        for _ in range(30):
            assert await asyncio.wait_for(reader.readline(), 20)
    await busy(cluster, pool)

    if abrupt:
        writer.transport.abort()
    writer.close()

    await free(cluster, pool)


async def test_a_grpc_client_that_cancels_in_the_middle_frees_its_slot_within_a_second(cluster):
    pool = await warm(cluster)
    request = inference_pb2.ChatRequest(
        model=RANDOM,
        messages=[inference_pb2.Message(role="user", content="Go on")],
        sampling=inference_pb2.Sampling(max_tokens=LONG),
    )
    async with open_channel(cluster.head) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Chat(request)
        for _ in range(10):
            assert await asyncio.wait_for(call.read(), 20) is not grpc.aio.EOF
        await busy(cluster, pool)

        call.cancel()

        await free(cluster, pool)


async def test_a_client_that_leaves_the_queue_gets_no_slot(cluster):
    """Not even for a moment when those who have one leave, too: the engine hears of nobody else."""
    pool = await warm(cluster)
    begun, left = taken_on(cluster, pool), await waited(cluster)
    tasks = [asyncio.create_task(cluster.say(RANDOM, max_tokens=LONG)) for _ in range(pool.instance.parallel)]
    await wait_until(lambda: all_busy(cluster, pool), within_s=20, what="every slot is busy")
    async with cluster.client() as client, AsyncExitStack() as queue:
        for _ in range(QUEUED):
            asked = client.chat(RANDOM, [Message("user", "Go on")], Sampling(max_tokens=LONG))
            told = await anext(await queue.enter_async_context(aclosing(asked)))
            assert isinstance(told, Progress), "it waits"

    async def gone():
        return await waited(cluster) == left + len(tasks) + QUEUED

    await wait_until(gone, what="the head knows that they have left")
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

    await free(cluster, pool)
    assert await cluster.say(RECITER) == RECITAL_20
    assert await cluster.say(RANDOM)
    assert taken_on(cluster, pool) == begun + len(tasks) + 1


def taken_on(cluster, pool):
    """How many requests the engine has begun with."""
    log = cluster.log_dir(pool.node_id) / f"{pool.instance.instance_id}.log"
    return log.read_text().count("| processing task, ")


async def waited(cluster):
    """How many requests have got a slot, or have left without one."""
    async with aiohttp.ClientSession() as session, session.get(f"{cluster.url}/metrics") as response:
        page = samples(families(await response.text()).values())
    return page.get(f"sollol_queue_wait_seconds_count{{model={RANDOM}}}", 0)


async def all_busy(cluster, pool):
    return await cluster.busy_slots(pool) == pool.instance.parallel
