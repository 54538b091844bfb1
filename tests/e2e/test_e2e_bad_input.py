"""Bad input: one typed error with the same reason on HTTP, gRPC and the command line; the daemons live on."""

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any

import pytest
from sollol.client import Message, Piece, Sampling
from sollol.errors import SURFACES, Reason, SollolError

from tests.e2e.cluster import RECITAL_20, chat_body
from tests.e2e.models import BROKEN, DIES_AT_START, RECITER
from tests.waiting import wait_until

pytestmark = pytest.mark.engine
CHAT = "/v1/chat/completions"
TOO_LONG = "How are you? " * 5_000


@dataclass(frozen=True)
class Case:
    """One mistake as each surface can make it; an empty tuple or None where the surface cannot."""

    reason: Reason
    says: str
    body: dict[str, Any]
    sampling: Sampling | None = None
    words: tuple[str, ...] | None = ()

    @property
    def model(self) -> str:
        return str(self.body["model"])

    @property
    def prompt(self) -> str:
        return str(self.body["messages"][0]["content"])


def named(name, reason, says, *, on_command_line=True):
    return Case(reason, says, chat_body(name), words=() if on_command_line else None)


def parameter(name, value):
    words = (f"--{name.replace('_', '-')}={value}",) if name in ("temperature", "seed") else None
    return Case(Reason.INVALID_REQUEST, name, chat_body(RECITER, **{name: value}), Sampling(**{name: value}), words)


CASES = {
    "an unknown model": named("tiny-recitr", Reason.MODEL_NOT_FOUND, RECITER),
    "a truncated file": named(BROKEN, Reason.MODEL_CORRUPT, BROKEN),
    "a prompt longer than the context": Case(
        Reason.CONTEXT_TOO_LONG, "n_ctx=4096", chat_body(RECITER, messages=[{"role": "user", "content": TOO_LONG}])
    ),
    "a name with ..": named("../../etc/passwd", Reason.INVALID_MODEL_NAME, "contains '..'"),
    "an absolute path": named("/etc/passwd", Reason.INVALID_MODEL_NAME, "starts with '/'"),
    "a name with NUL": named("tiny\0reciter", Reason.INVALID_MODEL_NAME, "characters other", on_command_line=False),
    "a name with a line feed": named("tiny\nreciter", Reason.INVALID_MODEL_NAME, "characters other"),
    "a name of 10 kB": named("x" * 10_240, Reason.INVALID_MODEL_NAME, "10240 characters"),
    "an empty name": named("", Reason.INVALID_MODEL_NAME, "is empty"),
    "a negative temperature": parameter("temperature", -1.0),
    "an absurd temperature": parameter("temperature", 1e300),
    "an absurd top_p": parameter("top_p", 1.5),
    "a negative top_k": parameter("top_k", -5),
    "no tokens": parameter("max_tokens", 0),
    "negative tokens": parameter("max_tokens", -1),
    "an absurd penalty": parameter("presence_penalty", 1e9),
}


async def lives_on(cluster):
    """The head answers, an answer is whole, and bytes are reserved for ready pools only."""
    assert await cluster.get("/healthz") == 200
    assert await cluster.get("/readyz") == 200
    assert await cluster.say(RECITER) == RECITAL_20
    await cluster.only_ready_pools_are_reserved()


async def http_refuses(cluster, reason, body, *, path=CHAT):
    """The error envelope of a request that is refused as `reason` says, streamed or not."""
    status, answer = await cluster.post(path, body)
    surface = SURFACES[reason]
    assert (status, answer["error"]["code"]) == (surface.http_status, reason), answer
    assert answer["error"]["type"] == surface.openai_type
    return answer["error"]


async def grpc_refuses(cluster, reason, model, prompt="?", sampling=None):
    async with cluster.client() as client:
        events = client.chat(model, [Message("user", prompt)], sampling)
        with pytest.raises(SollolError) as caught:
            await anext(piece async for piece in events if isinstance(piece, Piece))
    assert caught.value.refusal.reason is reason
    return caught.value.refusal


async def cli_refuses(cluster, reason, model, *words, prompt="?"):
    status, out, err = await cluster.cli("run", *words, "--", model, stdin=prompt.encode())
    assert status == SURFACES[reason].exit_code, err
    assert err.startswith(f"sollol: {reason}: ")
    assert "Traceback" not in err
    assert out == ""
    return err


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
async def test_every_surface_refuses_for_the_same_reason_in_the_same_words(cluster, case):
    error = await http_refuses(cluster, case.reason, case.body)
    streamed = await http_refuses(cluster, case.reason, {**case.body, "stream": True})
    refusal = await grpc_refuses(cluster, case.reason, case.model, case.prompt, case.sampling)

    assert case.says in error["message"]
    assert error == streamed
    assert error["message"] == refusal.message
    assert error["retry"] == refusal.retry
    assert len(error["message"]) < 1000
    if case.words is not None:
        err = await cli_refuses(cluster, case.reason, case.model, *case.words, prompt=case.prompt)
        assert error["message"] in err
    await lives_on(cluster)


MALFORMED = {
    "no JSON": b"{not json",
    "no UTF-8": b'{"model": "\xff\xfe"}',
    "an empty body": b"",
    "a list": b"[]",
    "null": b"null",
    "NaN": b'{"model": "tiny-reciter", "temperature": NaN}',
    "deep nesting": b"[" * 100_000,
    "no messages": chat_body(RECITER, messages=[]),
    "messages of a wrong type": chat_body(RECITER, messages="hello"),
    "a message that is no object": chat_body(RECITER, messages=["hello"]),
    "a role that is none": chat_body(RECITER, messages=[{"role": "robot", "content": "x"}]),
    "content of a wrong type": chat_body(RECITER, messages=[{"role": "user", "content": 5}]),
    "a model of a wrong type": {**chat_body(RECITER), "model": 5},
    "no model": {"messages": [{"role": "user", "content": "x"}]},
    "a temperature of a wrong type": chat_body(RECITER, temperature="hot"),
    "tokens of a wrong type": chat_body(RECITER, max_tokens="many"),
    "stream of a wrong type": chat_body(RECITER, stream="yes"),
    "a stop of a wrong type": chat_body(RECITER, stop=5),
    "two answers": chat_body(RECITER, n=2),
    "a tool of a wrong type": chat_body(RECITER, tools=[5]),
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
async def test_a_body_that_is_no_valid_request_is_one_invalid_request(cluster, body):
    error = await http_refuses(cluster, Reason.INVALID_REQUEST, body)

    assert error["message"]
    assert error["retry"] == "FATAL"
    await lives_on(cluster)


async def test_a_body_beyond_the_limit_is_refused_as_too_large(cluster):
    error = await http_refuses(cluster, Reason.REQUEST_TOO_LARGE, b"x" * (33_554_432 + 1))

    assert error["details"]["max_body_bytes"] == 33_554_432
    await lives_on(cluster)


async def test_nonsense_instead_of_http_and_grpc_harms_nobody(cluster):
    for port in (cluster.http_port, cluster.grpc_port):
        for nonsense in (
            b"\0" * 10_000,
            b"GET / HTTP/9.9\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 999,
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.suppress(OSError):  # it may hang up while we still write
                writer.write(nonsense)
                writer.write_eof()
                await asyncio.wait_for(reader.read(), 5)
            writer.close()

    await lives_on(cluster)


async def test_the_command_line_refuses_usage_that_no_head_needs_to_see(cluster):
    for words in (("run", "--max-tokens", "-5", RECITER), ("run", RECITER, "--seed", "x"), ("no-such-command",)):
        status, _, err = await cluster.cli(*words)
        assert status == 2
        assert "usage:" in err
    status, _, err = await cluster.cli("run", RECITER)
    assert (status, err.split(":")[1]) == (2, " INVALID_REQUEST")


async def test_an_engine_that_dies_at_its_start_shows_its_last_words_everywhere(faulty):
    reason = Reason.ENGINE_START_FAILED
    error = await http_refuses(faulty, reason, chat_body(DIES_AT_START))
    refusal = await grpc_refuses(faulty, reason, DIES_AT_START)
    err = await cli_refuses(faulty, reason, DIES_AT_START)

    for message in (error["message"], refusal.message, err):
        assert "exit status 3" in message
    assert "boom: the test says so" in error["log_lines"][-1]
    assert tuple(error["log_lines"]) == refusal.log_lines
    assert "| boom: the test says so" in err
    await lives_on(faulty)


async def test_a_model_that_keeps_dying_is_left_alone_for_a_while_and_says_so(faulty):
    async def left_alone():
        """Each try that finds a node willing costs a death there."""
        _, answer = await faulty.post(CHAT, chat_body(DIES_AT_START))
        error = answer["error"]
        return error if (error["code"], error["message"].count("BACKING_OFF") >= 2) == (Reason.NO_FIT, True) else None

    error = await wait_until(left_alone, within_s=60, what="no node tries it again")
    assert error["retry"] == "RETRYABLE"
    await lives_on(faulty)
