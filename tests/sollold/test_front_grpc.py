import asyncio
import contextlib

import grpc
import pytest
from sollol.channels import new_server, open_channel
from sollol.client import Client
from sollol.errors import Reason, SollolError, refuse
from sollol.inference import Message, Piece, Progress, Sampling, Usage
from sollol.v1 import inference_pb2 as pb
from sollol.v1 import inference_pb2_grpc as rpc

from sollold.front.grpc import InferenceService
from tests.fakes.fake_dispatcher import HELLO, HELLO_TEXT, MODEL, FakeCatalogue, FakeDispatcher, FakeStream
from tests.fakes.fake_keys import OPEN
from tests.fakes.fake_metrics import counting, samples
from tests.waiting import wait_until

HI = [Message("user", "hi")]


@pytest.fixture
async def serving(ports):
    async with contextlib.AsyncExitStack() as stack:

        async def start(answer=None, metrics=None):
            dispatcher = FakeDispatcher(answer)
            server = new_server()
            service = InferenceService(dispatcher, FakeCatalogue(MODEL), OPEN, metrics or counting())
            rpc.add_InferenceServiceServicer_to_server(service, server)
            address = f"127.0.0.1:{ports()}"
            server.add_insecure_port(address)
            await server.start()
            stack.push_async_callback(server.stop, 0)
            return dispatcher, await stack.enter_async_context(Client(address))

        yield start


async def everything(events):
    return [event async for event in events]


def text_of(events):
    return "".join(event.text for event in events if isinstance(event, Piece))


async def test_a_chat_streams_typed_pieces(serving):
    dispatcher, client = await serving()
    events = await everything(client.chat("tiny", HI, Sampling(temperature=0.5, max_tokens=9, stop=("x",))))
    assert text_of(events) == "Hello ✓"
    assert [event.finish_reason for event in events if event.finish_reason] == ["stop"]
    assert events[-1].usage == Usage(prompt_tokens=5, completion_tokens=2)
    request = dispatcher.requests[0]
    assert request.path == "/v1/chat/completions"
    for part in (b'"temperature":0.5', b'"max_tokens":9', b'"stop":["x"]', b'"include_usage":true', b'"stream":true'):
        assert part in request.body
    assert b"top_p" not in request.body
    assert dispatcher.answer.closed


async def test_a_completion_streams_typed_pieces(serving):
    dispatcher, client = await serving(FakeStream(chunks=HELLO_TEXT))
    events = await everything(client.complete("tiny", "say"))
    assert text_of(events) == "Hello"
    assert (events[-1].finish_reason, events[-1].usage) == ("length", Usage(prompt_tokens=5, completion_tokens=1))
    assert dispatcher.requests[0].path == "/v1/completions"


async def test_frames_that_arrive_together_leave_in_one_message(serving):
    _, client = await serving(FakeStream(chunks=(b"".join(HELLO),)))
    assert await everything(client.chat("tiny", HI)) == [
        Piece(text="Hello ✓", finish_reason="stop", usage=Usage(prompt_tokens=5, completion_tokens=2))
    ]


async def test_progress_is_told_while_the_model_loads(serving):
    seen = asyncio.Event()

    async def slow(request, on_progress):
        on_progress(Progress(state="loading", percent=42.0, node_id="node-a"))
        await seen.wait()
        return FakeStream()

    _, client = await serving(slow)
    events = []
    async for event in client.chat("tiny", HI):
        events.append(event)
        seen.set()
    assert events[0] == Progress(state="loading", percent=42.0, node_id="node-a")
    assert text_of(events) == "Hello ✓"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (refuse(Reason.NO_FIT, "nothing fits", numbers={"needed_bytes": 9}), Reason.NO_FIT),
        (FakeStream(chunks=HELLO[:3], error=refuse(Reason.ENGINE_DIED, "it died")), Reason.ENGINE_DIED),
        (FakeStream(chunks=HELLO[:3]), Reason.STREAM_TRUNCATED),
        (FakeStream(chunks=(b'{"error":{"type":"exceed_context_size_error"}}',), status=400), Reason.CONTEXT_TOO_LONG),
        (RuntimeError("bug"), Reason.INTERNAL),
    ],
)
async def test_a_failure_is_the_same_typed_error_as_over_http(serving, answer, reason):
    _, client = await serving(answer)
    with pytest.raises(SollolError) as caught:
        await everything(client.chat("tiny", HI))
    assert caught.value.refusal.reason is reason
    if reason is Reason.NO_FIT:
        assert caught.value.refusal.numbers == {"needed_bytes": 9}


async def test_a_wrong_parameter_is_refused_before_any_engine_is_asked(serving):
    dispatcher, client = await serving()
    for asking, message in [
        (client.chat("tiny", HI, Sampling(temperature=-1)), "temperature: expected a number"),
        (client.chat("tiny", HI, Sampling(max_tokens=0)), "max_tokens: expected a whole number"),
        (client.chat("tiny", []), "messages: expected 1 to 4096 items, got 0"),
        (client.chat("tiny", [Message("root", "x")]), r"messages\[0\].role: expected"),
        (client.complete("../x", "p"), "INVALID_MODEL_NAME"),
    ]:
        with pytest.raises(SollolError, match=message):
            await everything(asking)
    assert dispatcher.requests == []


async def test_who_leaves_in_mid_stream_frees_the_engine_within_a_second(serving):
    engine = FakeStream(chunks=HELLO[:3], hangs=True)
    _, client = await serving(engine)
    chat = client.chat("tiny", HI)
    await anext(chat)
    await chat.aclose()
    await wait_until(lambda: engine.closed, within_s=1, what="the stream was closed")


async def test_who_leaves_while_the_model_loads_gives_up_the_place(serving):
    async def loading(request, on_progress):
        on_progress(Progress(state="queued"))
        await asyncio.Event().wait()

    dispatcher, client = await serving(loading)
    chat = client.chat("tiny", HI)
    await anext(chat)
    await chat.aclose()
    await wait_until(lambda: dispatcher.cancelled, within_s=1, what="opening was cancelled")


async def test_models_are_listed(serving):
    _, client = await serving()
    assert await client.list_models() == (MODEL,)


async def test_a_bare_stub_reads_the_reason_from_the_trailers(serving):
    _, client = await serving(refuse(Reason.MODEL_NOT_FOUND, "no node has it"))
    async with open_channel(client._address) as channel:
        request = pb.ChatRequest(model="tiny", messages=[pb.Message(role="user", content="hi")])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await everything(rpc.InferenceServiceStub(channel).Chat(request))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert dict(caught.value.trailing_metadata())["sollol-reason"] == "MODEL_NOT_FOUND"


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (FakeStream(chunks=HELLO), "ok"),
        (refuse(Reason.NO_FIT, "too large"), "NO_FIT"),
        (FakeStream(chunks=HELLO[:2]), "STREAM_TRUNCATED"),
    ],
    ids=["answered", "refused", "cut"],
)
async def test_a_call_is_counted_by_how_it_ended(serving, answer, outcome):
    metrics = counting()
    _, client = await serving(answer, metrics)
    with contextlib.suppress(SollolError):
        await everything(client.chat("tiny", HI))
    found = samples(metrics.collect())
    assert found[f"sollol_requests_total{{front=grpc,model=tiny,outcome={outcome}}}"] == 1


async def test_a_call_that_its_user_gives_up_is_counted_as_that(serving):
    metrics = counting()
    dispatcher, client = await serving(FakeStream(chunks=HELLO[:2], hangs=True), metrics)
    async with contextlib.aclosing(client.chat("tiny", HI)) as events:
        await anext(events)

    def counted():
        return samples(metrics.collect()).get("sollol_requests_total{front=grpc,model=tiny,outcome=CANCELLED}")

    assert await wait_until(counted, within_s=10, what="the call is counted") == 1
    assert dispatcher.answer.closed
