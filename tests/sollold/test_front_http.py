import asyncio
import contextlib
import json
import socket
import time

import aiohttp
import openai
import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sollol.errors import Reason, refuse
from sollol.inference import Progress

from sollold.front import http
from tests.fakes.fake_dispatcher import HELLO, HELLO_TEXT, MODEL, FakeCatalogue, FakeDispatcher, FakeStream, chat_frame
from tests.fakes.fake_keys import OPEN
from tests.fakes.fake_metrics import counting, page_of
from tests.waiting import wait_until

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
DIED = refuse(Reason.ENGINE_DIED, "llama-server of pool-0 on node-a died", retryable=True, log_lines=("boom",))


@contextlib.asynccontextmanager
async def front(dispatcher, port, *, models=(MODEL,), grace_s=0.2, admission=OPEN, metrics=None):
    page = page_of(metrics or counting())
    app = http.build_app(
        dispatcher, FakeCatalogue(*models), admission, page, max_body_bytes=100_000, shutdown_grace_s=grace_s
    )
    runner = await http.serve(app, "127.0.0.1", port)
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            yield session
    finally:
        await runner.cleanup()


@pytest.fixture
async def serving(ports):
    async with contextlib.AsyncExitStack() as stack:

        async def start(answer=None, **options):
            dispatcher = FakeDispatcher(answer)
            return dispatcher, await stack.enter_async_context(front(dispatcher, ports(), **options))

        yield start


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(http, "WORD_EVERY_S", 0.03)


async def loading(request, on_progress):
    on_progress(Progress(state="loading", percent=42.0, node_id="node-a"))
    await asyncio.Event().wait()


def openai_options(session):
    return {"base_url": str(session._base_url / "v1"), "api_key": "none", "max_retries": 0}


def events_of(body: bytes):
    return [json.loads(line[6:]) for line in body.split(b"\n") if line.startswith(b"data: {")]


@pytest.mark.parametrize(("path", "chunks"), [(CHAT, HELLO), (COMPLETION, HELLO_TEXT)])
async def test_a_stream_passes_through_untouched(serving, path, chunks):
    dispatcher, session = await serving(FakeStream(chunks=chunks))
    body = {**ASK, "prompt": "hi", "stream": True}
    async with session.post(path, json=body, headers={"x-request-id": "abc-1"}) as response:
        assert await response.read() == b"".join(chunks)
    assert response.status == 200
    assert response.content_type == "text/event-stream"
    assert {name: response.headers[name] for name in ("x-request-id", "x-sollol-node", "x-sollol-pool")} == {
        "x-request-id": "abc-1", "x-sollol-node": "node-a", "x-sollol-pool": "pool-0",
    }  # fmt: skip
    assert (dispatcher.requests[0].model, dispatcher.requests[0].path) == ("tiny", path)
    assert dispatcher.answer.closed


async def test_an_answer_without_stream_is_assembled(serving):
    dispatcher, session = await serving()
    async with session.post(CHAT, json=ASK) as response:
        answer = await response.json()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Hello ✓"}
    assert answer["usage"]["total_tokens"] == 7
    assert response.headers["x-sollol-node"] == "node-a"
    assert json.loads(dispatcher.requests[0].body)["stream"] is True
    assert dispatcher.answer.closed


async def test_the_openai_package_streams_and_does_not(serving):
    _, session = await serving()
    async with openai.AsyncOpenAI(**openai_options(session)) as client:
        whole = await client.chat.completions.create(model="tiny", messages=ASK["messages"])
        assert whole.choices[0].message.content == "Hello ✓"
        assert whole.usage.total_tokens == 7
        stream = await client.chat.completions.create(model="tiny", messages=ASK["messages"], stream=True)
        pieces = [chunk.choices[0].delta.content async for chunk in stream if chunk.choices]
        assert "".join(piece or "" for piece in pieces) == "Hello ✓"
        assert [model.id async for model in client.models.list()] == ["tiny"]
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="tiny", messages=[], temperature=9)
        assert caught.value.code == "INVALID_REQUEST"
        assert caught.value.param == "messages"


async def test_the_openai_package_sees_an_error_in_mid_stream(serving, impatient):
    read = asyncio.Event()

    async def late(request, on_progress):
        await read.wait()
        return FakeStream(chunks=HELLO[:3], error=DIED)

    _, session = await serving(late)
    async with openai.AsyncOpenAI(**openai_options(session)) as client:
        stream = await client.chat.completions.create(model="tiny", messages=ASK["messages"], stream=True)
        read.set()
        with pytest.raises(openai.APIError, match="died"):
            async for _ in stream:
                pass


async def test_who_waits_for_a_load_reads_its_progress_and_then_the_answer(serving, impatient):
    read, loaded = asyncio.Event(), asyncio.Event()

    async def slow(request, on_progress):
        on_progress(Progress(state="queued"))
        await read.wait()
        on_progress(Progress(state="loading", percent=42.4, node_id="node-a"))
        await loaded.wait()
        return FakeStream()

    _, session = await serving(slow)
    async with session.post(CHAT, json={**ASK, "stream": True}) as response:
        body = await response.content.readany()
        read.set()
        while b": loading 42% on node-a\n\n" not in body:
            body += await response.content.readany()
        loaded.set()
        body += await response.read()
    assert body.startswith(b": queued\n\n")
    assert body.endswith(b"".join(HELLO))


async def test_a_load_that_fails_after_the_headers_ends_in_an_error_event(serving, impatient):
    begun = asyncio.Event()

    async def failing(request, on_progress):
        await begun.wait()
        raise refuse(Reason.ENGINE_START_FAILED, "it does not start", log_lines=("bad magic",))

    _, session = await serving(failing)
    async with session.post(CHAT, json={**ASK, "stream": True}) as response:
        begun.set()
        body = await response.read()
    assert response.status == 200
    (event,) = events_of(body)
    assert event["error"]["code"] == "ENGINE_START_FAILED"
    assert event["error"]["log_lines"] == ["bad magic"]


async def test_a_bug_after_the_headers_ends_in_an_error_event_too(serving, impatient):
    begun = asyncio.Event()

    async def broken(request, on_progress):
        await begun.wait()
        raise ZeroDivisionError

    _, session = await serving(broken)
    async with session.post(CHAT, json={**ASK, "stream": True}) as response:
        begun.set()
        *_, last = (await response.read()).rstrip().rpartition(b"\n\n")

    assert response.status == 200
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "INTERNAL"


async def test_an_error_in_mid_stream_says_when_to_come_back(serving, impatient):
    begun = asyncio.Event()

    async def full(request, on_progress):
        await begun.wait()
        raise refuse(Reason.NO_FIT, "full", retryable=True, retry_after_s=2.5)

    _, session = await serving(full)
    async with session.post(CHAT, json={**ASK, "stream": True}) as response:
        begun.set()
        (event,) = events_of(await response.read())

    assert (response.status, event["error"]["retry_after_s"]) == (200, 2.5)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_refusal_is_an_envelope_with_its_status(serving, stream):
    refusal = refuse(
        Reason.NO_FIT, "nothing fits:\nnode-a  short of 5 bytes", retryable=True, numbers={"needed_bytes": 9}
    )
    _, session = await serving(refusal)
    async with session.post(CHAT, json={**ASK, "stream": stream}) as response:
        answer = await response.json()
    assert response.status == 503
    assert response.headers["Retry-After"] == "5"
    assert answer["error"] == {
        "message": "nothing fits:\nnode-a  short of 5 bytes", "type": "unavailable_error", "code": "NO_FIT",
        "param": None, "retry": "RETRYABLE", "details": {"needed_bytes": 9},
    }  # fmt: skip


async def test_retry_after_is_rounded_up(serving):
    _, session = await serving(refuse(Reason.QUEUE_FULL, "full", retryable=True, retry_after_s=1.2))
    async with session.post(CHAT, json=ASK) as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "2")


@pytest.mark.parametrize(
    ("status", "error", "expected"),
    [
        (400, {"type": "exceed_context_size_error", "message": "m", "n_prompt_tokens": 9000, "n_ctx": 4096},
         (400, "CONTEXT_TOO_LONG", {"n_prompt_tokens": 9000, "n_ctx": 4096})),
        (400, {"type": "invalid_request_error", "message": "bad grammar"}, (400, "INVALID_REQUEST", None)),
        (501, {"type": "not_supported_error", "message": "no"}, (400, "INVALID_REQUEST", None)),
        (503, {"type": "unavailable_error", "message": "Loading model"}, (503, "INSTANCE_NOT_READY", None)),
        (500, {"type": "server_error", "message": "x"}, (500, "INTERNAL", None)),
        (500, "no object", (500, "INTERNAL", None)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [True, False])
async def test_an_engines_http_error_becomes_ours(serving, status, error, expected, stream):
    engine = FakeStream(chunks=(json.dumps({"error": error}).encode(),), status=status)
    _, session = await serving(engine)
    async with session.post(CHAT, json={**ASK, "stream": stream}) as response:
        answer = (await response.json())["error"]
    assert (response.status, answer["code"], answer.get("details")) == expected
    assert engine.closed


@pytest.mark.parametrize(
    ("error", "code"), [(DIED, "ENGINE_DIED"), (None, "STREAM_TRUNCATED"), (RuntimeError("bug"), "INTERNAL")]
)
async def test_a_stream_that_breaks_ends_with_an_explicit_error(serving, error, code):
    partial = chat_frame({"content": "never whole"})[:-9]
    _, session = await serving(FakeStream(chunks=(*HELLO[:3], partial), error=error))
    async with session.post(CHAT, json={**ASK, "stream": True}) as response:
        body = await response.read()
    whole = b"".join(HELLO[:3])
    assert body.startswith(whole)
    (event,) = events_of(body[len(whole) :])
    assert event["error"]["code"] == code
    async with session.post(CHAT, json=ASK) as response:
        assert (await response.json())["error"]["code"] == code
        assert response.status >= 500


async def test_the_engines_own_error_event_is_not_followed_by_another(serving):
    error = b'data: {"error":{"code":500,"message":"Compute error.","type":"server_error"}}\n\n'
    _, session = await serving(FakeStream(chunks=(*HELLO[:2], error)))
    async with session.post(CHAT, json={**ASK, "stream": True}) as response:
        assert await response.read() == b"".join(HELLO[:2]) + error
    async with session.post(CHAT, json=ASK) as response:
        assert (await response.json())["error"]["message"] == "engine: Compute error."


@pytest.mark.parametrize("stream", [True, False])
async def test_who_leaves_in_mid_stream_frees_the_engine_within_a_second(serving, stream):
    engine = FakeStream(chunks=HELLO[:3], hangs=True)
    dispatcher, session = await serving(engine)
    asking = asyncio.create_task(session.post(CHAT, json={**ASK, "stream": stream}))
    if stream:
        response = await asking
        await response.content.readany()
        response.close()
    else:
        await wait_until(lambda: dispatcher.requests, what="the request arrived")
        asking.cancel()
        await asyncio.wait({asking})
    await wait_until(lambda: engine.closed, within_s=1, what="the stream was closed")


@pytest.mark.parametrize("stream", [True, False])
async def test_who_leaves_while_the_model_loads_gives_up_the_place(serving, impatient, stream):
    dispatcher, session = await serving(loading)
    asking = asyncio.create_task(session.post(CHAT, json={**ASK, "stream": stream}))
    await wait_until(lambda: dispatcher.requests, what="the request arrived")
    if stream:
        (await asking).close()
    else:
        asking.cancel()
        await asyncio.wait({asking})
    await wait_until(lambda: dispatcher.cancelled, within_s=1, what="opening was cancelled")


async def test_a_reader_that_takes_nothing_is_given_up(serving, monkeypatch):
    monkeypatch.setattr("sollold.front.events.WRITE_STALL_S", 0.2)
    endless = FakeStream(chunks=(chat_frame({"content": "x" * 60_000}),) * 400)
    _, session = await serving(endless)
    port = session._base_url.port
    _reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    body = json.dumps({**ASK, "stream": True}).encode()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )
    await wait_until(lambda: endless.closed, within_s=5, what="the stalled reader was given up")
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def test_a_reader_that_stalls_with_an_answer_that_is_all_written_is_given_up_too(serving, monkeypatch):
    """How much the kernel takes is its own affair: some of these lengths end just when nothing more can leave."""
    monkeypatch.setattr("sollold.front.events.WRITE_STALL_S", 0.2)
    streams = [FakeStream(chunks=(chat_frame({"content": "x" * 60_000}),) * length) for length in range(1, 90, 2)]
    waiting = iter(streams)

    async def next_one(request, on_progress):
        return next(waiting)

    _, session = await serving(next_one)
    async with contextlib.AsyncExitStack() as stack:
        for _ in streams:
            writer = await _asking_and_reading_nothing(session._base_url.port)
            stack.callback(writer.close)

        await wait_until(lambda: all(stream.closed for stream in streams), within_s=10, what="all streams are closed")


async def _asking_and_reading_nothing(port):
    narrow = socket.socket()
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    narrow.setblocking(False)
    await asyncio.get_running_loop().sock_connect(narrow, ("127.0.0.1", port))
    _, writer = await asyncio.open_connection(sock=narrow, limit=1024)
    body = json.dumps({**ASK, "stream": True}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    writer.write(head % len(body) + body)
    return writer


@pytest.mark.parametrize("sent", [b"", b"GET /v1/models HTTP/1.1\r\nHost: loc"])
async def test_a_connection_that_sends_no_whole_request_is_ended(serving, monkeypatch, sent):
    monkeypatch.setattr(http, "KEEPALIVE_S", 0.2)
    _, session = await serving()
    reader, writer = await asyncio.open_connection("127.0.0.1", session._base_url.port)
    writer.write(sent)

    assert await asyncio.wait_for(reader.read(), 5) == b""

    writer.close()


async def test_at_shutdown_a_running_stream_gets_a_last_word(ports):
    engine = FakeStream(chunks=HELLO[:3], hangs=True)
    dispatcher = FakeDispatcher(engine)
    page = page_of(counting())
    app = http.build_app(dispatcher, FakeCatalogue(MODEL), OPEN, page, max_body_bytes=1000, shutdown_grace_s=0.1)
    port = ports()
    runner = await http.serve(app, "127.0.0.1", port)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        async with session.post(CHAT, json={**ASK, "stream": True}) as streaming:
            waiting = asyncio.create_task(session.post(CHAT, json=ASK))
            first = await streaming.content.readany()
            await wait_until(lambda: len(dispatcher.requests) == 2, what="both requests run")
            started = time.monotonic()
            await asyncio.gather(runner.cleanup(), wait_until(waiting.done, what="the other request was answered"))
            assert time.monotonic() - started < 10
            rest = first + await streaming.read()
        async with await waiting as response:
            assert (response.status, (await response.json())["error"]["code"]) == (503, "SHUTTING_DOWN")
    assert events_of(rest)[-1]["error"]["code"] == "SHUTTING_DOWN"
    assert engine.closed


async def test_models_are_listed_and_found_by_name_and_alias(serving):
    slashed = type(MODEL)(name="org/repo:Q4_K_M")
    _, session = await serving(models=(MODEL, slashed))
    async with session.get("/v1/models") as response:
        listed = await response.json()
    assert [entry["id"] for entry in listed["data"]] == ["tiny", "org/repo:Q4_K_M"]
    assert listed["data"][0]["sollol"]["node_ids"] == ["node-a"]
    for name, found in [("tiny:latest", "tiny"), ("org/repo:Q4_K_M", "org/repo:Q4_K_M")]:
        async with session.get(f"/v1/models/{name}") as response:
            assert (await response.json())["id"] == found
    async with session.get("/v1/models/tinny") as response:
        answer = (await response.json())["error"]
    assert (response.status, answer["code"]) == (404, "MODEL_NOT_FOUND")
    assert "did you mean tiny" in answer["message"]


async def test_alive_always_ready_only_with_a_node(serving):
    for models, status in [((), 503), ((MODEL,), 200)]:
        _, session = await serving(models=models)
        async with session.get("/healthz") as response:
            assert response.status == 200
        async with session.get("/readyz") as response:
            assert response.status == status
            assert ("Retry-After" in response.headers) == (status == 503)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "PATH_NOT_ALLOWED"),
        ("GET", CHAT, 405, "PATH_NOT_ALLOWED"),
        ("DELETE", "/v1/models", 405, "PATH_NOT_ALLOWED"),
    ],
)
async def test_unknown_routes_and_methods_answer_in_the_same_envelope(serving, method, path, status, code):
    _, session = await serving()
    async with session.request(method, path) as response:
        answer = await response.json()
    assert (response.status, answer["error"]["code"]) == (status, code)
    assert ("Allow" in response.headers) == (status == 405)
    assert response.headers["x-request-id"]


async def test_a_body_that_is_too_large_or_unreadable_is_refused(serving):
    dispatcher, session = await serving()
    async with session.post(CHAT, data=b"[" + b" " * 200_000) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (413, "REQUEST_TOO_LARGE")
    async with session.post(CHAT, data=b"not gzip", headers={"Content-Encoding": "gzip"}) as response:
        assert response.status == 400
    assert dispatcher.requests == []


async def test_an_insane_request_id_is_replaced(serving):
    _, session = await serving()
    async with session.get("/healthz", headers={"x-request-id": "a b\t{}"}) as response:
        assert response.headers["x-request-id"] not in ("", "a b\t{}")


async def test_each_request_leaves_one_line(serving):
    _, session = await serving(FakeStream(chunks=HELLO[:2], error=DIED))
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        async with session.post(CHAT, json={**ASK, "stream": True}, headers={"x-request-id": "r1"}) as response:
            await response.read()
        await wait_until(lambda: lines, what="the line was written")
    (line,) = lines
    assert line["event"] == "request_ended"
    assert (line["request_id"], line["model"], line["node"], line["reason"]) == ("r1", "tiny", "node-a", "ENGINE_DIED")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
BODIES = st.binary(max_size=60) | st.builds(
    lambda base, extra: json.dumps({**base, **extra}).encode(),
    st.sampled_from([{}, ASK, {"model": "tiny", "prompt": "x"}]),
    st.dictionaries(
        st.sampled_from(["model", "messages", "prompt", "stream", "temperature", "stop", "tools"]), json_values
    ),
)


async def test_random_bodies_are_answered_or_refused_but_never_break_the_front(serving):
    _, session = await serving()
    loop = asyncio.get_running_loop()
    bodies = []

    @settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow], database=None)
    @given(BODIES)
    def collect(body):
        bodies.append(body)

    await loop.run_in_executor(None, collect)
    for body in bodies:
        for path in (CHAT, COMPLETION):
            async with session.post(path, data=body) as response:
                await response.read()
                assert response.status == 200 or 400 <= response.status < 500, body
