import asyncio
from contextlib import AsyncExitStack

import grpc.aio
import pytest
from sollol.channels import refusal_of
from sollol.errors import Reason, Refusal
from sollol.v1 import agent_pb2, common_pb2

from agent import relay as relay_module
from agent.engine_client import connect
from agent.streams import Streams
from tests.relays import RelayNode, ScriptedEngine, agent_stub
from tests.waiting import wait_until


class Head:
    """The frames of one relay call, as a head sends and gets them."""

    def __init__(self, stub):
        self.call = stub.Relay()
        self.frames = []
        self.batches = []
        self._reader = asyncio.create_task(self._read(), name="test-head-reader")

    async def _read(self):
        async for batch in self.call:
            self.batches.append(batch)
            self.frames.extend(batch.frames)

    async def send(self, *frames):
        await self.call.write(agent_pb2.RelayRequest(frames=frames))

    async def open(self, stream=1, *, path="/completion", method="POST", credit=1 << 18, headers=None, body=b"{}"):
        request = agent_pb2.Open(
            instance_id="pool-0", method=method, path=path, headers=headers or {}, body=body, credit_bytes=credit
        )
        await self.send(agent_pb2.UpFrame(stream=stream, open=request))

    async def cancel(self, stream=1):
        await self.send(agent_pb2.UpFrame(stream=stream, cancel=agent_pb2.Cancel()))

    async def grant(self, stream, count):
        await self.send(agent_pb2.UpFrame(stream=stream, credit=agent_pb2.Credit(bytes=count)))

    def data(self, stream=1):
        return b"".join(frame.data for frame in self.frames if frame.stream == stream)

    def head(self, stream=1):
        return next((f.head for f in self.frames if f.stream == stream and f.HasField("head")), None)

    def end(self, stream=1):
        return next((f.end for f in self.frames if f.stream == stream and f.HasField("end")), None)

    async def ended(self, stream=1, within_s=5.0):
        end = await wait_until(lambda: self.end(stream), within_s=within_s, what=f"End of stream {stream}")
        last = [frame for frame in self.frames if frame.stream == stream][-1]
        assert last.HasField("end"), "nothing follows End"
        return end

    async def close(self):
        self.call.cancel()
        await asyncio.wait({self._reader})
        if not self._reader.cancelled():
            self._reader.exception()


@pytest.fixture
async def stack():
    async with AsyncExitStack() as entered:
        yield entered


@pytest.fixture
async def node(stack, tmp_path):
    return await stack.enter_async_context(RelayNode(f"unix:{tmp_path}/agent.sock").running())


@pytest.fixture
async def stub(stack, node):
    return await stack.enter_async_context(agent_stub(node.address))


@pytest.fixture
async def head(stub):
    head = Head(stub)
    yield head
    await head.close()


@pytest.fixture
async def engine_for(stack, node, tmp_path):
    async def start(script, instance_id="pool-0"):
        engine = ScriptedEngine(tmp_path / f"{instance_id}.sock", script)
        await stack.enter_async_context(engine.running())
        node.sockets[instance_id] = engine.path
        return engine

    return start


def reason(end):
    return common_pb2.Reason.Name(end.refusal.reason).removeprefix("REASON_")


async def test_a_counted_response_arrives_whole_with_status_and_headers(engine_for, head):
    await engine_for(lambda c: c.respond(b'{"error":1}', status="400 Bad Request"))
    await head.open()
    end = await head.ended()
    assert not end.HasField("refusal")
    assert head.head().status == 400
    assert dict(head.head().headers) == {"content-type": "application/json", "content-length": "11"}
    assert head.data() == b'{"error":1}'


async def test_chunks_leave_as_they_come(engine_for, head):
    go = asyncio.Event()

    async def script(conversation):
        await conversation.start_stream()
        await conversation.chunk(b"data: 1\n\n")
        await go.wait()
        await conversation.chunk(b"data: 2\n\n")
        await conversation.finish()

    await engine_for(script)
    await head.open()
    await wait_until(lambda: head.data() == b"data: 1\n\n", what="the first chunk, alone")
    go.set()
    assert not (await head.ended()).HasField("refusal")
    assert head.data() == b"data: 1\n\ndata: 2\n\n"


async def test_the_engine_sees_the_body_and_only_harmless_headers(engine_for, head):
    bodies = []

    async def script(conversation):
        bodies.append(conversation.body)
        await conversation.respond(b"{}")

    engine = await engine_for(script)
    headers = {"Content-Type": "application/json", "X-Conversation-Id": "7", "Authorization": "Bearer key"}
    await head.open(headers=headers, body=b'{"prompt":"x"}')
    await head.ended()
    assert bodies == [b'{"prompt":"x"}']
    assert "Content-Type: application/json" in engine.heads[0]
    assert "onversation" not in engine.heads[0]
    assert "Bearer" not in engine.heads[0]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/props"),
        ("POST", "/slots/0?action=erase"),
        ("GET", "/v1/stream?conv_id=7"),
        ("POST", "/completion?x=1"),
        ("POST", "/completion HTTP/1.1\r\nX: y"),
        ("DELETE", "/completion"),
        ("POST", "//completion"),
        ("POST", ""),
    ],
)
async def test_other_paths_never_reach_the_engine(engine_for, head, method, path):
    engine = await engine_for(lambda c: c.respond(b"{}"))
    await head.open(method=method, path=path)
    assert reason(await head.ended()) == "PATH_NOT_ALLOWED"
    assert engine.heads == []


async def test_heads_may_ask_for_slots_and_props(engine_for, head):
    await engine_for(lambda c: c.respond(b"[]"))
    await head.open(1, method="GET", path="/slots")
    await head.open(2, method="GET", path="/props")
    await head.ended(1)
    await head.ended(2)
    assert head.data(1) == head.data(2) == b"[]"


async def test_a_header_that_would_split_the_request_is_refused(engine_for, head):
    engine = await engine_for(lambda c: c.respond(b"{}"))
    await head.open(headers={"accept": "a\r\nX-Conversation-Id: 1"})
    assert reason(await head.ended()) == "INVALID_REQUEST"
    assert engine.heads == []


async def test_an_unknown_instance_ends_with_the_supervisors_reason(head):
    await head.open()
    end = await head.ended()
    assert reason(end) == "INSTANCE_NOT_FOUND"


async def test_cancel_closes_the_engines_connection_at_once(engine_for, node, head):
    closed = asyncio.Event()

    async def script(conversation):
        await conversation.start_stream()
        await conversation.chunk(b"x")
        await conversation.gone()
        closed.set()

    await engine_for(script)
    await head.open()
    await wait_until(head.data, what="the first chunk")
    assert node.relay.streams.active("pool-0") == 1
    await head.cancel()
    await asyncio.wait_for(closed.wait(), 1)
    assert reason(await head.ended()) == "CANCELLED"
    await wait_until(lambda: node.relay.streams.active("pool-0") == 0, what="no active stream")


async def test_streams_of_an_agent_that_restarts_end_with_that_word_and_so_do_later_ones(engine_for, node, head):
    left = asyncio.Event()

    async def script(conversation):
        await conversation.start_stream()
        await conversation.chunk(b"so far")
        await conversation.gone()
        left.set()

    await engine_for(script)
    await head.open(1)
    await wait_until(lambda: head.data(1) == b"so far", what="the first bytes")

    await node.relay.leave()

    assert reason(await head.ended(1)) == "AGENT_RESTARTING"
    assert head.data(1) == b"so far"
    await asyncio.wait_for(left.wait(), 1)
    await head.open(2)
    end = await head.ended(2)
    assert (reason(end), end.refusal.retry) == ("AGENT_RESTARTING", common_pb2.RETRY_RETRYABLE)


async def test_a_stream_cancelled_with_its_opening_never_reaches_the_engine(engine_for, head):
    engine = await engine_for(lambda c: c.respond(b"{}"))
    request = agent_pb2.Open(instance_id="pool-0", method="POST", path="/completion", credit_bytes=1)
    await head.send(agent_pb2.UpFrame(stream=1, open=request), agent_pb2.UpFrame(stream=1, cancel=agent_pb2.Cancel()))
    assert reason(await head.ended()) == "CANCELLED"
    assert engine.heads == []


async def test_a_head_that_leaves_frees_every_slot(engine_for, node, stub):
    gone = []

    async def script(conversation):
        await conversation.start_stream()
        await conversation.gone()
        gone.append(1)

    await engine_for(script)
    head = Head(stub)
    await head.open(1)
    await head.open(2)
    await wait_until(lambda: head.head(1) and head.head(2), what="both streams running")
    await head.close()
    await wait_until(lambda: len(gone) == 2, within_s=1, what="both engine connections closed")
    await wait_until(lambda: node.relay.streams.active("pool-0") == 0, what="no active stream")


async def test_a_stream_without_credit_waits_while_others_go_on(engine_for, head):
    written = []

    async def script(conversation):
        await conversation.start_stream()
        for _ in range(64):
            await conversation.chunk(b"x" * 65536)
            written.append(65536)
        await conversation.finish()

    await engine_for(script)
    await head.open(1, credit=1000)
    await wait_until(lambda: len(head.data(1)) == 1000, what="the credit used up")
    await head.open(2, credit=64 * 65536)
    await head.ended(2)
    assert len(head.data(2)) == 64 * 65536
    assert len(head.data(1)) == 1000
    assert sum(written) < 64 * 65536 + 2_000_000, "the stalled engine was read on"
    await head.grant(1, 64 * 65536)
    await head.ended(1)
    assert len(head.data(1)) == 64 * 65536


async def test_a_stalled_stream_that_is_cancelled_ends(engine_for, head):
    await engine_for(lambda c: c.respond(b"x" * 5000))
    await head.open(credit=10)
    await wait_until(lambda: len(head.data()) == 10, what="the credit used up")
    await head.cancel()
    assert reason(await head.ended()) == "CANCELLED"
    assert len(head.data()) == 10


async def test_a_body_cut_short_ends_with_engine_died(engine_for, head, monkeypatch):
    monkeypatch.setattr(relay_module, "FAILURE_WAIT_S", 0.1)

    async def script(conversation):
        await conversation.start_stream()
        await conversation.chunk(b"data: 1\n\n")

    await engine_for(script)
    await head.open()
    end = await head.ended()
    assert reason(end) == "ENGINE_DIED"
    assert end.refusal.retry == common_pb2.RETRY_RETRYABLE
    assert head.data() == b"data: 1\n\n"


async def test_the_supervisors_reason_wins_when_it_comes_soon(engine_for, node, head):
    async def script(conversation):
        asyncio.get_running_loop().call_later(0.1, node.failures.__setitem__, "pool-0", why)

    why = Refusal(reason=Reason.OUT_OF_MEMORY, message="killed by the kernel", log_lines=("last words",))
    await engine_for(script)
    await head.open()
    end = await head.ended()
    assert reason(end) == "OUT_OF_MEMORY"
    assert list(end.refusal.log_lines) == ["last words"]


async def test_an_engine_that_does_not_listen_ends_with_engine_died(node, head, tmp_path, monkeypatch):
    monkeypatch.setattr(relay_module, "FAILURE_WAIT_S", 0.05)
    node.sockets["pool-0"] = tmp_path / "nobody.sock"
    await head.open()
    assert reason(await head.ended()) == "ENGINE_DIED"


async def test_a_damaged_response_ends_truncated(engine_for, head):
    await engine_for(lambda c: c.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"))
    await head.open()
    assert reason(await head.ended()) == "STREAM_TRUNCATED"


async def test_a_stream_opened_twice_ends_the_call(engine_for, head):
    await engine_for(lambda c: c.gone())
    request = agent_pb2.Open(instance_id="pool-0", method="POST", path="/completion", credit_bytes=1)
    await head.send(agent_pb2.UpFrame(stream=1, open=request), agent_pb2.UpFrame(stream=1, open=request))
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await head._reader
    assert refusal_of(raised.value).reason is Reason.INVALID_REQUEST


async def test_streams_beyond_the_limit_are_refused(engine_for, head, monkeypatch):
    monkeypatch.setattr(relay_module, "MAX_STREAMS", 2)
    await engine_for(lambda c: c.gone())
    for stream in (1, 2, 3):
        await head.open(stream)
    assert reason(await head.ended(3)) == "QUEUE_FULL"


async def test_frames_of_many_streams_share_messages(engine_for, head):
    go = asyncio.Event()

    async def script(conversation):
        await conversation.start_stream()
        await go.wait()
        await conversation.chunk(b"token")
        await conversation.finish()

    await engine_for(script)
    for stream in range(1, 41):
        await head.open(stream)
    await wait_until(lambda: all(head.head(stream) for stream in range(1, 41)), what="40 heads")
    before = len(head.batches)
    go.set()
    await asyncio.gather(*(head.ended(stream) for stream in range(1, 41)))
    assert all(head.data(stream) == b"token" for stream in range(1, 41))
    assert len(head.batches) - before < 20


async def test_many_connections_at_once_outlast_a_short_backlog(tmp_path):
    """A full backlog of a unix socket shows as EAGAIN, which the event loop's own connect takes for success."""
    import socket

    from agent.engine_client import Exchange

    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "busy.sock"))
    listener.listen(1)
    listener.setblocking(False)
    exchanges = [Exchange(b"hello", lambda *_: None, lambda _: None) for _ in range(8)]
    connecting = [asyncio.create_task(connect(tmp_path / "busy.sock", exchange)) for exchange in exchanges]
    loop = asyncio.get_running_loop()
    accepted = []
    for _ in exchanges:
        connection, _ = await asyncio.wait_for(loop.sock_accept(listener), 5)
        accepted.append(connection)
        assert await asyncio.wait_for(loop.sock_recv(connection, 10), 5) == b"hello"
    await asyncio.gather(*connecting)
    for exchange in exchanges:
        exchange.abort()
    for connection in [*accepted, listener]:
        connection.close()


class LostCall:
    """A relay call on which gRPC raises, first when the answer to one frame is written, then when the next is read."""

    def __init__(self):
        self.written = asyncio.Event()
        request = agent_pb2.Open(instance_id="pool-0", method="GET", path="/none")
        self._message = agent_pb2.RelayRequest(frames=[agent_pb2.UpFrame(stream=1, open=request)])

    async def read(self):
        if self._message is not None:
            message, self._message = self._message, None
            return message
        await self.written.wait()
        raise grpc.aio.UsageError("Server already stopped.")

    async def write(self, message):
        self.written.set()
        raise grpc.aio.UsageError("RPC already finished.")


async def test_a_call_that_is_lost_ends_its_streams_and_is_no_error():
    relay = relay_module.Relay(lambda _: None, lambda _: None, Streams())

    await asyncio.wait_for(relay.serve(LostCall()), 5)

    assert relay.streams.active("pool-0") == 0
