"""Keys at the two fronts, over real sockets; what they decide is tested with admission."""

import asyncio
import contextlib

import aiohttp
import openai
import pytest
import structlog
from sollol import log
from sollol.channels import new_server
from sollol.client import Client
from sollol.errors import Reason, SollolError
from sollol.inference import AvailableModel, Message
from sollol.v1 import inference_pb2_grpc as rpc
from structlog.testing import capture_logs

from sollold.admission import Admission
from sollold.front import http
from sollold.front.grpc import InferenceService
from sollold.key_file import KeyFile, change
from tests.fakes.fake_dispatcher import HELLO, MODEL, FakeCatalogue, FakeDispatcher, FakeStream
from tests.fakes.fake_keys import key_of, token_of
from tests.fakes.fake_metrics import counting, page_of
from tests.waiting import wait_until

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
CHAT = "/v1/chat/completions"
OTHER = AvailableModel(name="other:70b", node_ids=("node-a",))


class Head:
    """Both fronts over one admission and one file of keys."""

    def __init__(self, path, port):
        self.path = path
        self.url = f"http://127.0.0.1:{port}"
        self.dispatcher = FakeDispatcher()
        self.grpc = ""

    def keys(self, *keys):
        change(self.path, lambda _: keys)

    async def openai(self, name):
        """One chat, as the openai package asks for it."""
        async with openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=token_of(name), max_retries=0) as client:
            return await client.chat.completions.create(**ASK)

    async def post(self, body=ASK, path=CHAT, **headers):
        async with aiohttp.ClientSession() as session, session.post(self.url + path, json=body, headers=headers) as got:
            return got.status, await got.json(), got.headers

    async def get(self, path, **headers):
        async with aiohttp.ClientSession() as session, session.get(self.url + path, headers=headers) as got:
            return got.status, await got.json(), got.headers


@pytest.fixture
async def head(ports, tmp_path):
    head = Head(tmp_path / "keys.json", ports())
    known = {"tiny": "tiny", "tiny:latest": "tiny", "other:70b": "other:70b"}
    admission = Admission(KeyFile(head.path), mode="auto", known=known.get)
    catalogue = FakeCatalogue(MODEL, OTHER)
    metrics = counting()
    app = http.build_app(
        head.dispatcher, catalogue, admission, page_of(metrics), max_body_bytes=1000, shutdown_grace_s=0.2
    )
    runner = await http.serve(app, "127.0.0.1", int(head.url.rpartition(":")[2]))
    server = new_server()
    rpc.add_InferenceServiceServicer_to_server(InferenceService(head.dispatcher, catalogue, admission, metrics), server)
    head.grpc = f"127.0.0.1:{ports()}"
    server.add_insecure_port(head.grpc)
    await server.start()
    yield head
    await server.stop(0)
    await runner.cleanup()


def bearer(name):
    return {"Authorization": f"Bearer {token_of(name)}"}


async def test_without_keys_the_head_is_open_and_with_one_it_is_not(head):
    assert (await head.post())[0] == 200
    head.keys(key_of("alice"))
    status, body, headers = await head.post()
    assert (status, body["error"]["code"], body["error"]["type"]) == (401, "KEY_MISSING", "authentication_error")
    assert headers["WWW-Authenticate"] == "Bearer"
    assert len(head.dispatcher.requests) == 1


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"Origin": "https://evil.example"}, "a page of 'evil.example'"),
        ({"Origin": "null"}, "came without an API key"),
        ({"Host": "rebound.example:7460"}, "a request to 'rebound.example'"),
        ({"Host": "10.0.0.1"}, "a request to '10.0.0.1'"),
        ({"Host": ""}, "came without an API key"),
        ({"Host": "[::2]:80"}, "a request to '::2'"),
    ],
)
async def test_without_keys_no_page_of_the_web_asks_and_none_reads_what_there_is(head, headers, said):
    for status, body, _ in (await head.post(**headers), await head.get("/v1/models", **headers)):
        assert (status, body["error"]["code"]) == (401, "KEY_MISSING")
        assert said in body["error"]["message"]
    assert head.dispatcher.requests == []
    assert (await head.get("/healthz", **headers))[0] == 200
    head.keys(key_of("alice"))
    assert (await head.post(**bearer("alice"), **headers))[0] == 200, "a key says who may"


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://localhost:3000"}, {"Host": "localhost"}, {"Host": "[::1]:7460"}, {"Host": "127.8.9.1"}],
)
async def test_without_keys_pages_and_programs_of_this_machine_may_ask(head, headers):
    assert (await head.post(**headers))[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        bearer("alice"),
        {"Authorization": f"bearer   {token_of('alice')} "},
        {"X-Api-Key": token_of("alice")},
        {"Authorization": "Basic YTpi", "X-Api-Key": token_of("alice")},
    ],
)
async def test_a_key_is_taken_from_either_header(head, headers):
    head.keys(key_of("alice"))
    assert (await head.post(**headers))[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        bearer("guess"),
        {"Authorization": token_of("alice")},
        {"Authorization": f"Basic {token_of('alice')}"},
        {"Authorization": "Bearer"},
        {"Authorization": f"Bearer {token_of('alice')}x"},
        {"X-Api-Key": token_of("Alice")},
        {**bearer("guess"), "X-Api-Key": token_of("alice")},
    ],
)
async def test_anything_else_is_401(head, headers):
    head.keys(key_of("alice"))
    assert (await head.post(**headers))[0] == 401


async def test_an_unknown_and_a_revoked_key_get_the_very_same_answer(head):
    head.keys(key_of("alice"), key_of("bob", revoked_unix_s=1.0))
    unknown, revoked = await head.post(**bearer("guess")), await head.post(**bearer("bob"))
    assert unknown[:2] == revoked[:2]
    assert unknown[0] == 401


async def test_whoever_has_no_key_is_refused_before_the_body_is_read(head):
    head.keys(key_of("alice"))
    reader, writer = await asyncio.open_connection("127.0.0.1", int(head.url.rpartition(":")[2]))
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n")
    status = await asyncio.wait_for(reader.readline(), 5)
    writer.close()
    assert b" 401 " in status


async def test_probes_need_no_key_and_every_other_path_does(head):
    head.keys(key_of("alice"))
    for path, status in {"/healthz": 200, "/readyz": 200, "/v1/models": 401, "/v1/models/tiny": 401, "/x": 401}.items():
        assert (await head.get(path))[0] == status, path


async def test_a_key_sees_and_uses_only_the_models_it_is_for(head):
    head.keys(key_of("alice", models=("tiny*",)), key_of("bob"))
    _, alices, _ = await head.get("/v1/models", **bearer("alice"))
    _, bobs, _ = await head.get("/v1/models", **bearer("bob"))
    assert [model["id"] for model in alices["data"]] == ["tiny"]
    assert [model["id"] for model in bobs["data"]] == ["tiny", "other:70b"]
    status, body, _ = await head.get("/v1/models/other:70b", **bearer("alice"))
    assert status == 404
    assert "other:70b" not in body["error"]["message"].partition("did you mean")[2]
    status, body, _ = await head.post({**ASK, "model": "other:70b"}, **bearer("alice"))
    assert (status, body["error"]["code"], body["error"]["type"]) == (403, "KEY_SCOPE", "permission_error")
    assert (await head.post({**ASK, "model": "tiny:latest"}, **bearer("alice")))[0] == 200


async def test_the_openai_package_understands_each_refusal(head):
    head.keys(
        key_of("alice", models=("other*",)),
        key_of("bob", expires_unix_s=1.0),
        key_of("carol", tokens_per_minute=1),
    )
    with pytest.raises(openai.AuthenticationError):
        await head.openai("guess")
    with pytest.raises(openai.AuthenticationError) as expired:
        await head.openai("bob")
    assert expired.value.code == "KEY_EXPIRED"
    with pytest.raises(openai.PermissionDeniedError):
        await head.openai("alice")
    await head.openai("carol")
    with pytest.raises(openai.RateLimitError) as limited:
        await head.openai("carol")
    assert limited.value.code == "KEY_TOKENS"
    assert 360 < int(limited.value.response.headers["Retry-After"]) <= 420  # 7 tokens were used, one comes a minute


async def test_one_request_too_many_is_429_until_one_ends(head):
    head.keys(key_of("alice", concurrency=1), key_of("bob"))
    head.dispatcher.answer = FakeStream(chunks=HELLO[:2], hangs=True)
    async with (
        aiohttp.ClientSession(headers=bearer("alice")) as session,
        session.post(head.url + CHAT, json={**ASK, "stream": True}) as running,
    ):
        await running.content.readline()
        status, body, headers = await head.post(**bearer("alice"))
        assert (status, body["error"]["code"], headers["Retry-After"]) == (429, "KEY_CONCURRENCY", "1")
        head.dispatcher.answer = FakeStream()
        assert (await head.post(**bearer("bob")))[0] == 200

    async def admitted():
        return (await head.post(**bearer("alice")))[0] == 200

    await wait_until(admitted, what="the place of the request that was left is free")


async def test_a_request_that_is_refused_leaves_no_place_taken(head):
    head.keys(key_of("alice", concurrency=1))
    for _ in range(3):
        assert (await head.post({**ASK, "temperature": -1}, **bearer("alice")))[0] == 400
    head.dispatcher.answer = RuntimeError("bug")
    for _ in range(3):
        assert (await head.post(**bearer("alice")))[0] == 500
    head.dispatcher.answer = FakeStream()
    assert (await head.post(**bearer("alice")))[0] == 200


async def test_a_revoked_key_is_refused_within_a_second_and_another_keys_stream_goes_on(head):
    head.keys(key_of("alice"), key_of("bob"))
    go_on = asyncio.Event()

    class Slow(FakeStream):
        async def __aiter__(self):
            yield HELLO[0]
            await go_on.wait()
            for chunk in HELLO[1:]:
                yield chunk

    head.dispatcher.answer = Slow()
    async with (
        aiohttp.ClientSession(headers=bearer("bob")) as session,
        session.post(head.url + CHAT, json={**ASK, "stream": True}) as running,
    ):
        first = await running.content.readuntil(b"\n\n")
        head.keys(key_of("alice", revoked_unix_s=1.0), key_of("bob"))
        assert (await head.post(**bearer("alice")))[0] == 401
        go_on.set()
        assert first + await running.content.read() == b"".join(HELLO)


async def test_a_file_that_is_garbled_while_the_head_runs_refuses_everybody_with_503(head):
    head.keys(key_of("alice"))
    head.path.write_text("garbled")
    for headers in ({}, bearer("alice")):
        status, body, answered = await head.post(**headers)
        assert (status, body["error"]["code"]) == (503, "KEYS_UNREADABLE")
        assert "Retry-After" in answered
    head.path.unlink()
    assert (await head.post())[0] == 503


async def test_a_limited_stream_passes_unchanged(head):
    head.keys(key_of("alice", tokens_per_minute=1000))
    async with (
        aiohttp.ClientSession(headers=bearer("alice")) as session,
        session.post(head.url + CHAT, json={**ASK, "stream": True}) as running,
    ):
        assert await running.read() == b"".join(HELLO)


async def said(client):
    return [event async for event in client.chat("tiny", [Message("user", "hi")])]


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        ("", Reason.KEY_MISSING),
        (token_of("guess"), Reason.KEY_INVALID),
        (token_of("bob"), Reason.KEY_EXPIRED),
        (token_of("carol"), Reason.KEY_SCOPE),
    ],
)
async def test_grpc_refuses_what_http_does(head, sent, reason):
    head.keys(key_of("alice"), key_of("bob", expires_unix_s=1.0), key_of("carol", models=("other*",)))
    async with Client(head.grpc, key=sent) as client:
        for asking in (said(client), anext(client.complete("tiny", "hi"))):
            with pytest.raises(SollolError) as caught:
                await asking
            assert caught.value.refusal.reason is reason
    assert head.dispatcher.requests == []


async def test_each_front_says_in_its_own_words_how_a_key_is_sent(head):
    head.keys(key_of("alice"))
    assert "`Authorization: Bearer KEY` or `X-Api-Key: KEY`" in (await head.post())[1]["error"]["message"]
    async with Client(head.grpc) as client:
        with pytest.raises(SollolError, match="as metadata, `authorization: Bearer KEY` or `x-api-key: KEY`"):
            await client.list_models()


async def test_every_grpc_call_is_a_line_in_the_log_with_its_key_and_why_it_was_refused(head):
    head.keys(key_of("alice", concurrency=1), key_of("carol", models=("other*",)))
    with capture_logs() as logs:
        async with Client(head.grpc) as client:
            with pytest.raises(SollolError, match="KEY_MISSING"):
                await client.list_models()
        async with Client(head.grpc, key=token_of("carol")) as client:
            with pytest.raises(SollolError, match="KEY_SCOPE"):
                await said(client)
        head.dispatcher.answer = FakeStream(chunks=HELLO[:2], hangs=True)
        async with Client(head.grpc, key=token_of("alice")) as client:
            async with contextlib.aclosing(client.chat("tiny", [Message("user", "hi")])) as running:
                await anext(running)
                with pytest.raises(SollolError, match="KEY_CONCURRENCY"):
                    await said(client)
            await wait_until(lambda: len(lines(logs)) == 4, what="the one that was let go of has ended")
            head.dispatcher.answer = FakeStream(chunks=HELLO)
            assert await said(client)
        await wait_until(lambda: len(lines(logs)) == 5, what="the last one has ended")
    assert lines(logs) == [
        ("ListModels", None, "KEY_MISSING"),
        ("Chat", "carol", "KEY_SCOPE"),
        ("Chat", "alice", "KEY_CONCURRENCY"),
        ("Chat", "alice", "CANCELLED"),
        ("Chat", "alice", None),
    ]


def lines(logs):
    ended = [line for line in logs if line["event"] == "request_ended" and line["method"] == "gRPC"]
    return [(line["path"], line.get("key_name"), line.get("reason")) for line in ended]


async def test_grpc_takes_the_same_key_and_shows_the_same_models(head):
    head.keys(key_of("alice", models=("tiny*",), concurrency=1))
    async with Client(head.grpc, key=token_of("alice")) as client:
        assert [model.name for model in await client.list_models()] == ["tiny"]
        assert await said(client)
        assert await said(client)
    async with Client(head.grpc) as client:
        with pytest.raises(SollolError, match="KEY_MISSING"):
            await client.list_models()


@pytest.fixture
def logging_as():
    """What sets up logging as a daemon does; a level left behind would silence the logs that other tests look at."""
    yield log.configure
    structlog.reset_defaults()


async def test_no_key_is_ever_in_a_log(head, capsys, logging_as):
    logging_as("debug", "json")
    head.keys(key_of("alice"), key_of("bob", revoked_unix_s=1.0))
    for name in ("alice", "bob", "guess"):
        await head.post(**bearer(name))
    async with Client(head.grpc, key=token_of("bob")) as client:
        with contextlib.suppress(SollolError):
            await said(client)
    written = capsys.readouterr().err
    assert written.count("key_refused") == 3
    assert '"key_name":"alice"' in written
    assert "sk-sollol" not in written
