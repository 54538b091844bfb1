"""Keys over real daemons, the real engine and the openai package."""

import asyncio
import contextlib
import time

import openai
import psutil
import pytest

from tests.certificates import authority, write_identity
from tests.e2e.cluster import RECITAL_20, chat_body
from tests.e2e.models import RANDOM, RECITER
from tests.waiting import wait_until

pytestmark = pytest.mark.engine
LONG = 4000
LONG_ENOUGH = 1500  # tokens: one refusal comes meanwhile, at once


@pytest.fixture
async def cluster(by_hand):
    by_hand.start_agent("node")
    by_hand.start_head()
    await by_hand.nodes_seen(1)
    await by_hand.say(RECITER)  # open as yet, and warm from here on
    return by_hand


async def made(cluster, name, *limits):
    status, out, err = await cluster.cli("keys", "add", name, *limits)
    assert status == 0, err
    return out.strip()


@contextlib.asynccontextmanager
async def user(cluster, key):
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key=key, max_retries=0) as client:
        yield client


async def said(client, model=RECITER, **more):
    answer = await client.chat.completions.create(**chat_body(model, **more))
    return answer.choices[0].message.content


async def streamed(client, begun, **more):
    """The finish reason of a whole stream, and how many of its chunks told usage."""
    finish, usages = None, 0
    async with await client.chat.completions.create(**chat_body(stream=True, **more)) as stream:
        async for chunk in stream:
            begun.set()
            usages += chunk.usage is not None
            finish = chunk.choices[0].finish_reason or finish if chunk.choices else finish
    return finish, usages


async def test_the_openai_package_gets_401_403_and_429_and_everything_else_with_a_good_key(cluster):
    alice = await made(cluster, "alice", "--models", "tiny-r*", "--concurrency", "1")
    bob = await made(cluster, "bob", "--models", "tiny-random")
    async with user(cluster, alice) as client, user(cluster, bob) as other, user(cluster, "sk-sollol-guess") as nobody:
        with pytest.raises(openai.AuthenticationError):
            await said(nobody)
        with pytest.raises(openai.AuthenticationError):
            await nobody.models.list()
        assert await said(client) == RECITAL_20
        with pytest.raises(openai.PermissionDeniedError) as refused:
            await said(other)
        assert refused.value.code == "KEY_SCOPE"
        assert [model.id async for model in await other.models.list()] == [RANDOM]

        begun = asyncio.Event()
        running = asyncio.create_task(streamed(client, begun, model=RANDOM, max_tokens=LONG_ENOUGH))
        await asyncio.wait_for(begun.wait(), 20)
        with pytest.raises(openai.RateLimitError) as busy:
            await said(client)
        assert (busy.value.code, busy.value.response.headers["Retry-After"]) == ("KEY_CONCURRENCY", "1")
        assert (await running)[0] == "length"

        async def served():
            """The end of a stream that comes in two pieces frees its key a moment later."""
            with contextlib.suppress(openai.RateLimitError):
                return await said(client)

        assert await wait_until(served, within_s=10, what="the key is free again") == RECITAL_20

    status, _, err = await cluster.cli("run", RECITER, "hello")
    assert (status, "KEY_MISSING" in err) == (5, True)
    cluster.environ["SOLLOL_KEY"] = alice
    assert (await cluster.cli("run", RECITER, "hello", "--max-tokens", "20"))[:2] == (0, f"{RECITAL_20}\n")


async def test_tokens_are_counted_by_the_engine_though_the_user_did_not_ask_for_usage(cluster):
    limited = await made(cluster, "alice", "--tokens-per-minute", "40")
    async with user(cluster, limited) as client:
        assert await streamed(client, asyncio.Event(), model=RECITER) == ("length", 0)
        with pytest.raises(openai.RateLimitError) as limit:
            await said(client)
    assert limit.value.code == "KEY_TOKENS"
    async with cluster.engine(await cluster.ready_pool(RECITER)) as engine:
        answer = await (await engine.post("http://engine/v1/chat/completions", json=chat_body(RECITER))).json()
    overdrawn = answer["usage"]["total_tokens"] - 40
    assert overdrawn > 5
    waits_s = float(limit.value.response.headers["Retry-After"])  # rounded up; a little has come in meanwhile
    assert 60 / 40 * (overdrawn - 8) < waits_s <= 60 / 40 * (overdrawn + 1) + 1


async def test_a_revoked_key_is_refused_within_a_second_while_another_keys_stream_runs_on(cluster):
    alice, bob = await made(cluster, "alice"), await made(cluster, "bob")
    async with user(cluster, alice) as client, user(cluster, bob) as other:
        begun = asyncio.Event()
        running = asyncio.create_task(streamed(other, begun, model=RANDOM, max_tokens=LONG))
        await asyncio.wait_for(begun.wait(), 20)
        refused_at, stop = [], asyncio.Event()

        async def keep_asking():
            while not stop.is_set():
                try:
                    await said(client, max_tokens=1)
                except openai.AuthenticationError:
                    refused_at.append(time.monotonic())
                    return

        asking = [asyncio.create_task(keep_asking()) for _ in range(3)]
        status, _, err = await cluster.cli("keys", "revoke", "alice")
        revoked_at = time.monotonic()
        assert status == 0, err
        await wait_until(lambda: len(refused_at) == 3, within_s=5, what="all of alice's loops are refused")
        await asyncio.gather(*asking)
        assert max(refused_at) < revoked_at + 1
        assert not running.done()
        assert (await running)[0] == "length"

    assert '"why":"revoked"' in cluster.log("head")
    arguments = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            arguments += child.cmdline()
    for key in (alice, bob):
        assert key not in cluster.log("head") + cluster.log("node") + "".join(arguments)


async def test_a_head_that_others_reach_does_not_start_without_keys(by_hand):
    tls_dir = write_identity(by_hand.home / "pki", authority(), "head", "h")
    head = by_hand.start_head("--listen", "0.0.0.0", "--tls-dir", str(tls_dir))
    assert await asyncio.to_thread(head.wait, 20) == 2
    assert "sollol keys add NAME" in by_hand.log("head")
