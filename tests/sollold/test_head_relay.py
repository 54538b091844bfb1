import asyncio
from contextlib import AsyncExitStack

import pytest
from sollol.errors import Reason, Refusal, Retry, SollolError
from sollol.v1 import agent_pb2

from sollold.relay import WINDOW_BYTES, AgentRelay
from tests.relays import RelayNode, ScriptedEngine, agent_stub
from tests.waiting import wait_until


@pytest.fixture
async def stack():
    async with AsyncExitStack() as entered:
        yield entered


@pytest.fixture
async def node(stack, tmp_path):
    return await stack.enter_async_context(RelayNode(f"unix:{tmp_path}/agent.sock").running())


@pytest.fixture
async def relay(stack, tmp_path):
    stub = await stack.enter_async_context(agent_stub(f"unix:{tmp_path}/agent.sock"))
    relay = AgentRelay(stub, "the-agent")
    yield relay
    await relay.close()


@pytest.fixture
async def engine_for(stack, node, tmp_path):
    async def start(script):
        engine = ScriptedEngine(tmp_path / "pool-0.sock", script)
        await stack.enter_async_context(engine.running())
        node.sockets["pool-0"] = engine.path
        return engine

    return start


def post(relay, body=b"{}"):
    return relay.open("pool-0", "POST", "/completion", {"content-type": "application/json"}, body)


async def test_a_stream_gives_status_headers_and_every_byte(engine_for, relay):
    async def script(conversation):
        await conversation.start_stream()
        for number in range(50):
            await conversation.chunk(b"data: %d\n\n" % number)
        await conversation.finish()

    await engine_for(script)
    async with post(relay) as stream:
        status, headers = await stream.response()
        assert (status, headers["content-type"]) == (200, "text/event-stream")
        body = b"".join([chunk async for chunk in stream])
    assert body == b"".join(b"data: %d\n\n" % number for number in range(50))
    assert relay.streams == 0


async def test_streams_far_larger_than_the_window_pass_whole(engine_for, relay):
    """Credit is granted as the reader takes bytes."""
    body = bytes(range(256)) * (4 * WINDOW_BYTES // 256)
    await engine_for(lambda c: c.respond(body))
    async with post(relay) as stream:
        assert b"".join([chunk async for chunk in stream]) == body


async def test_a_reader_that_stops_holds_no_more_than_its_window(engine_for, relay):
    chunk = b"x" * 65536

    async def script(conversation):
        await conversation.start_stream()
        if conversation.body == b"slow":
            for _ in range(100):
                await conversation.chunk(chunk)
        else:
            await conversation.chunk(b"fast")
        await conversation.finish()

    await engine_for(script)
    async with post(relay, b"slow") as slow:
        await slow.response()
        await wait_until(lambda: slow._unread_bytes == WINDOW_BYTES, what="the window full")
        async with post(relay, b"fast") as fast:
            assert [piece async for piece in fast] == [b"fast"]
        assert slow._unread_bytes == WINDOW_BYTES
        total = sum([len(piece) async for piece in slow])
    assert total == 100 * 65536


async def test_leaving_the_block_frees_the_engine(engine_for, relay):
    closed = asyncio.Event()

    async def script(conversation):
        await conversation.start_stream()
        await conversation.chunk(b"x")
        await conversation.gone()
        closed.set()

    await engine_for(script)
    async with post(relay) as stream:
        assert await anext(stream) == b"x"
    await asyncio.wait_for(closed.wait(), 1)
    assert relay.streams == 0
    stream.cancel()
    with pytest.raises(SollolError) as raised:
        await anext(stream)
    assert raised.value.refusal.reason is Reason.CANCELLED


async def test_a_cancelled_reader_task_frees_the_engine(engine_for, relay):
    closed = asyncio.Event()

    async def script(conversation):
        await conversation.start_stream()
        await conversation.gone()
        closed.set()

    async def reader():
        async with post(relay) as stream:
            await stream.response()
            reading.set()
            await anext(stream)

    reading = asyncio.Event()
    await engine_for(script)
    task = asyncio.create_task(reader())
    await asyncio.wait_for(reading.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(closed.wait(), 1)


async def test_a_stream_cancelled_before_it_was_sent_never_reaches_the_engine(engine_for, relay):
    engine = await engine_for(lambda c: c.respond(b"{}"))
    post(relay).cancel()
    async with post(relay) as stream:
        assert [piece async for piece in stream] == [b"{}"]
    assert len(engine.heads) == 1


async def test_the_agents_refusal_is_raised_with_its_reason(node, relay):
    async with post(relay) as stream:
        with pytest.raises(SollolError) as raised:
            await stream.response()
    assert raised.value.refusal.reason is Reason.INSTANCE_NOT_FOUND


async def test_bytes_before_a_failure_are_read_before_it_is_raised(engine_for, relay, node):
    node.failures["pool-0"] = Refusal(reason=Reason.ENGINE_DIED, message="aborted")

    async def script(conversation):
        await conversation.start_stream()
        await conversation.chunk(b"half")

    await engine_for(script)
    async with post(relay) as stream:
        got = await anext(stream)
        with pytest.raises(SollolError) as raised:
            await anext(stream)
    assert got == b"half"
    assert raised.value.refusal.reason is Reason.ENGINE_DIED


async def test_no_agent_is_agent_unreachable(relay):
    async with post(relay) as stream:
        with pytest.raises(SollolError) as raised:
            await stream.response()
    assert raised.value.refusal.reason is Reason.AGENT_UNREACHABLE


async def test_losing_the_agent_fails_its_streams_and_the_next_one_dials_again(tmp_path, relay):
    async def script(conversation):
        await conversation.start_stream()
        await conversation.chunk(b"x")
        await conversation.gone()

    node = RelayNode(f"unix:{tmp_path}/agent.sock")
    server = await node.serve()
    async with ScriptedEngine(tmp_path / "pool-0.sock", script).running() as engine:
        node.sockets["pool-0"] = engine.path
        async with post(relay) as stream:
            assert await anext(stream) == b"x"
            await server.stop(0)
            with pytest.raises(SollolError) as raised:
                await anext(stream)
        assert raised.value.refusal.reason is Reason.AGENT_UNREACHABLE
        async with node.running():

            async def again():
                async with post(relay) as stream:
                    try:
                        return await anext(stream)
                    except SollolError:
                        return b""

            assert await wait_until(again, within_s=10, what="a stream over the new connection") == b"x"


async def test_closing_ends_open_streams(engine_for, relay):
    await engine_for(lambda c: c.gone())
    stream = post(relay)
    await relay.close()
    with pytest.raises(SollolError) as raised:
        await stream.response()
    assert raised.value.refusal.reason is Reason.SHUTTING_DOWN
    assert raised.value.refusal.retry is Retry.RETRYABLE, "another head, or the next one, can be asked"


async def test_an_agent_that_ignores_credit_loses_the_stream(engine_for, relay):
    await engine_for(lambda c: c.gone())
    stream = post(relay)
    stream.data(b"x" * WINDOW_BYTES)
    stream.data(b"y")
    await anext(stream)
    with pytest.raises(SollolError) as raised:
        await anext(stream)
    assert raised.value.refusal.reason is Reason.INTERNAL
    assert relay.streams == 0


async def test_grants_that_wait_to_be_sent_join_into_one(engine_for, relay):
    await engine_for(lambda c: c.gone())
    post(relay)
    call = relay._call
    call.grant(9, 10)
    call.grant(9, 5)
    assert call._due[9] == [agent_pb2.UpFrame(stream=9, credit=agent_pb2.Credit(bytes=15))]


async def test_two_hundred_streams_share_one_call_without_mixing(engine_for, relay):
    async def script(conversation):
        await conversation.start_stream()
        for number in range(20):
            await conversation.chunk(b"%s:%d " % (conversation.body, number))
            await asyncio.sleep(0)
        await conversation.finish()

    async def one(number):
        async with post(relay, b"%d" % number) as stream:
            return b"".join([piece async for piece in stream])

    await engine_for(script)
    bodies = await asyncio.gather(*(one(number) for number in range(200)))
    for number, body in enumerate(bodies):
        assert body == b"".join(b"%d:%d " % (number, count) for count in range(20))


async def test_a_silent_stream_ends_stalled_and_frees_the_engine(engine_for, relay):
    closed = asyncio.Event()

    async def script(conversation):
        await conversation.start_stream()
        await conversation.chunk(b"x")
        await conversation.gone()
        closed.set()

    await engine_for(script)
    async with post(relay) as stream:
        assert await anext(stream) == b"x"
        stream.limit_silence(0.2)
        with pytest.raises(SollolError) as raised:
            await anext(stream)
    assert raised.value.refusal.reason is Reason.STREAM_STALLED
    await asyncio.wait_for(closed.wait(), 5)


async def test_a_slow_reader_is_not_taken_for_a_silent_engine(engine_for, relay):
    go = asyncio.Event()

    async def script(conversation):
        await conversation.start_stream()
        await conversation.chunk(b"x")
        await go.wait()
        await conversation.chunk(b"y")
        await conversation.finish()

    await engine_for(script)
    async with post(relay) as stream:
        assert await anext(stream) == b"x"
        stream.limit_silence(0.8)
        checks = asyncio.get_running_loop().time() + 2.4
        await wait_until(lambda: asyncio.get_running_loop().time() > checks, what="three periods of a reader at work")
        go.set()
        assert [piece async for piece in stream] == [b"y"]
