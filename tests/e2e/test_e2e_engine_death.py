"""`kill -9` of the engine: whoever reads its stream is told, nothing stays reserved, and the next request works."""

import asyncio
import contextlib
import os
import signal
import time

import grpc
import pytest
from sollol.channels import REASON_KEY, open_channel
from sollol.client import Message, Piece, Sampling
from sollol.errors import Reason, SollolError
from sollol.report import InstanceState, PlacementWish
from sollol.v1 import inference_pb2, inference_pb2_grpc

from tests.e2e.cluster import RECITAL_20, text_of
from tests.e2e.models import FROZEN, KILLED_EARLY, KILLED_GRPC, KILLED_HTTP, KILLED_LOADING, RANDOM
from tests.waiting import wait_until

pytestmark = pytest.mark.engine
SLEEPER_ANYWHERE, SLEEPER_PINNED = KILLED_LOADING
LONG = 4000


async def frozen(cluster, model):
    """A ready pool whose engine is stopped by SIGSTOP: what it has said so far is all that it will say."""
    await cluster.say(model)
    pool = await cluster.ready_pool(model)
    os.kill(pool.instance.pid, signal.SIGSTOP)
    return pool


async def nothing_of(cluster, pool):
    """Wait until no ledger holds bytes for the pool, and its node has them to give again."""

    async def given_back():
        return pool.instance.instance_id not in await cluster.reserved()

    await wait_until(given_back, within_s=5, what=f"no bytes are reserved for {pool.instance.instance_id}")
    await cluster.only_ready_pools_are_reserved()


async def test_an_http_stream_ends_with_the_reason_when_its_engine_is_killed(cluster):
    before = await cluster.say(KILLED_HTTP, cache_prompt=False)
    pool = await cluster.ready_pool(KILLED_HTTP)
    text, last = "", {}
    async with cluster.stream(KILLED_HTTP, max_tokens=LONG) as events:
        async for event in events:
            if not text and text_of(event):
                os.kill(pool.instance.pid, signal.SIGKILL)
            text += text_of(event)
            last = event

    assert text
    assert last["error"]["code"] == Reason.ENGINE_DIED
    assert last["error"]["retry"] == "RETRYABLE"
    assert "SIGKILL" in last["error"]["message"]
    await nothing_of(cluster, pool)
    assert await cluster.say(KILLED_HTTP, cache_prompt=False) == before
    assert (await cluster.ready_pool(KILLED_HTTP)).instance.instance_id != pool.instance.instance_id


async def test_a_grpc_stream_ends_with_the_reason_in_its_trailers_when_its_engine_is_killed(cluster):
    before = await cluster.say(KILLED_GRPC, cache_prompt=False)
    pool = await cluster.ready_pool(KILLED_GRPC)
    request = inference_pb2.ChatRequest(
        model=KILLED_GRPC,
        messages=[inference_pb2.Message(role="user", content="Go on")],
        sampling=inference_pb2.Sampling(max_tokens=LONG),
    )
    async with open_channel(cluster.head) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Chat(request)
        await asyncio.wait_for(call.read(), 5)
        os.kill(pool.instance.pid, signal.SIGKILL)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(read_to_the_end(call), 10)

    assert dict(caught.value.trailing_metadata())[REASON_KEY] == Reason.ENGINE_DIED
    assert caught.value.code() is grpc.StatusCode.ABORTED
    await nothing_of(cluster, pool)
    assert await cluster.say(KILLED_GRPC, cache_prompt=False) == before


async def read_to_the_end(call):
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_every_stream_of_a_killed_engine_is_told(faulty):
    await faulty.say(RANDOM)
    pool = await faulty.ready_pool(RANDOM)
    reading = [asyncio.Event() for _ in range(pool.instance.parallel)]

    async def read_all(begun):
        last = {}
        async with faulty.stream(RANDOM, max_tokens=LONG) as events:
            async for event in events:
                last = event
                begun.set()
        return last["error"]["code"]

    async def read_typed(begun):
        async with faulty.client() as client:
            async for event in client.chat(RANDOM, [Message("user", "?")], Sampling(max_tokens=LONG)):
                if isinstance(event, Piece):
                    begun.set()

    readers = [asyncio.create_task((read_typed if at == 0 else read_all)(begun)) for at, begun in enumerate(reading)]
    await asyncio.wait_for(asyncio.gather(*(begun.wait() for begun in reading)), 5)

    os.kill(pool.instance.pid, signal.SIGKILL)
    typed, *codes = await asyncio.wait_for(asyncio.gather(*readers, return_exceptions=True), 10)

    assert codes == [Reason.ENGINE_DIED] * (pool.instance.parallel - 1)
    assert isinstance(typed, SollolError)
    assert typed.refusal.reason is Reason.ENGINE_DIED
    await nothing_of(faulty, pool)
    assert await faulty.say(RANDOM)


async def test_a_frozen_engine_is_told_to_its_reader_and_a_request_without_a_token_is_answered_by_another(cluster):
    before = await cluster.say(FROZEN, cache_prompt=False)
    pool = await cluster.ready_pool(FROZEN)
    last, waiting = {}, None
    async with cluster.stream(FROZEN, max_tokens=LONG) as events:
        async for event in events:
            if waiting is None and text_of(event):
                os.kill(pool.instance.pid, signal.SIGSTOP)
                frozen_s = time.monotonic()
                waiting = asyncio.create_task(cluster.say(FROZEN, cache_prompt=False))
            last = event

    assert last["error"]["code"] == Reason.ENGINE_STALLED
    assert "stopped by a signal" in last["error"]["message"]
    assert time.monotonic() - frozen_s < 5
    assert await waiting == before
    await nothing_of(cluster, pool)
    assert (await cluster.ready_pool(FROZEN)).instance.instance_id != pool.instance.instance_id


async def test_a_request_whose_engine_is_killed_before_its_first_token_is_answered_by_another(cluster):
    pool = await frozen(cluster, KILLED_EARLY)
    asked = asyncio.create_task(cluster.say(KILLED_EARLY))
    await wait_until(lambda: has_stream(cluster, pool), within_s=5, what="the request is with the engine")

    with contextlib.suppress(ProcessLookupError):  # its agent may have been faster: it ends what is frozen
        os.kill(pool.instance.pid, signal.SIGKILL)

    assert await asked == RECITAL_20
    await nothing_of(cluster, pool)


async def has_stream(cluster, pool):
    found = await cluster.pools(pool.instance.model)
    return any(item.instance.active_streams for item in found if item.instance.instance_id == pool.instance.instance_id)


async def test_a_request_whose_engine_is_killed_while_it_loads_is_answered_by_another(faulty):
    asked = asyncio.create_task(faulty.say(SLEEPER_ANYWHERE))
    pool = await wait_until(lambda: loading(faulty, SLEEPER_ANYWHERE), within_s=5, what="the engine loads")

    os.kill(pool.instance.pid, signal.SIGKILL)

    assert await asked == RECITAL_20
    await nothing_of(faulty, pool)
    assert pool.node_id != (await faulty.ready_pool(SLEEPER_ANYWHERE)).node_id


async def test_a_load_that_may_go_nowhere_else_says_that_its_engine_was_killed_and_the_next_one_works(faulty):
    wish = PlacementWish(model=SLEEPER_PINNED, pinned_node="node-1")
    async with faulty.client() as client:
        asked = asyncio.create_task(client.load(wish))
        pool = await wait_until(lambda: loading(faulty, SLEEPER_PINNED), within_s=5, what="the engine loads")
        os.kill(pool.instance.pid, signal.SIGKILL)
        with pytest.raises(SollolError) as caught:
            await asked

    assert caught.value.refusal.reason is Reason.ENGINE_DIED
    await nothing_of(faulty, pool)
    assert await faulty.say(SLEEPER_PINNED) == RECITAL_20


async def loading(cluster, model):
    starting = [pool for pool in await cluster.pools(model) if pool.instance.state is InstanceState.STARTING]
    return next((pool for pool in starting if pool.instance.pid), None)


async def test_unloading_a_model_in_the_middle_of_a_stream_tells_its_reader(faulty):
    await faulty.say(KILLED_GRPC)
    pool = await faulty.ready_pool(KILLED_GRPC)
    last = {}
    async with faulty.stream(KILLED_GRPC, max_tokens=LONG) as events, faulty.client() as client:
        while not text_of(await anext(events)):
            pass
        unloading = asyncio.create_task(client.unload(KILLED_GRPC))
        async for event in events:
            last = event

    assert last["error"]["code"] == Reason.STOPPED
    assert await unloading == (pool.instance.instance_id,)
    await nothing_of(faulty, pool)
    assert await faulty.say(KILLED_GRPC)
