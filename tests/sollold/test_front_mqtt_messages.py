import json

import pytest
from sollol.errors import Reason, SollolError, refuse
from sollol.inference import Progress, Usage

from sollold.front.checks import BadParameterError
from sollold.front.mqtt_messages import Answer, read_request

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
PROMPT = {"model": "m", "prompt": "hi"}


def read(body, user=None, max_bytes=10_000):
    return read_request(json.dumps(body).encode(), user or {}, max_bytes=max_bytes)


@pytest.mark.parametrize(
    ("body", "path"), [(CHAT, "/v1/chat/completions"), (PROMPT, "/v1/completions")], ids=["messages", "prompt"]
)
def test_messages_or_a_prompt_become_the_engines_request_with_usage(body, path):
    asked = read({**body, "max_tokens": 9, "stream": False, "stream_options": {"include_usage": False}}).asked
    sent = json.loads(asked.engine.body)
    assert asked.engine.path == path
    assert (sent["model"], sent["max_tokens"], sent["stream"]) == ("m", 9, True)
    assert sent["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("body", "user", "token"),
    [(PROMPT, {}, None), ({**PROMPT, "api_key": "k"}, {}, "k"), ({**PROMPT, "api_key": "k"}, {"api_key": "p"}, "p")],
)
def test_a_key_comes_in_a_user_property_or_in_the_body_and_never_reaches_the_engine(body, user, token):
    wanted = read(body, user)
    assert wanted.token == token
    assert b"api_key" not in wanted.asked.engine.body


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"", "body: expected JSON"),
        (b"[]", "a JSON object"),
        (b'{"model": "m"}', "either `messages` or `prompt`"),
        (b'{"model": "m", "prompt": "x", "messages": []}', "either `messages` or `prompt`"),
        (b'{"prompt": "x"}', "model"),
        (b'{"model": "m", "prompt": "x", "temperature": 9}', "temperature"),
        (b'{"model": "m", "prompt": "x", "api_key": 7}', "api_key: expected a string"),
        (b"\xff", "body: expected JSON"),
    ],
)
def test_what_http_would_refuse_is_refused_with_the_same_words(payload, says):
    with pytest.raises(SollolError) as refused:
        read_request(payload, {}, max_bytes=1000)
    assert refused.value.refusal.reason is Reason.INVALID_REQUEST
    assert says in refused.value.refusal.message


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({**CHAT, "tools": [TOOL]}, "tools"),
        ({**CHAT, "logprobs": True}, "logprobs"),
        ({**PROMPT, "logprobs": 0}, "logprobs"),
    ],
)
def test_what_an_answer_of_text_cannot_carry_is_refused(body, param):
    with pytest.raises(BadParameterError, match="ask over HTTP") as refused:
        read(body)
    assert refused.value.param == param


@pytest.mark.parametrize("more", [{"tools": []}, {"tools": None}, {"logprobs": False}, {"logprobs": None}])
def test_what_asks_for_nothing_but_text_is_taken(more):
    assert read({**CHAT, **more}).asked.engine.model == "m"


def test_a_payload_that_is_too_large_is_refused_unread():
    with pytest.raises(SollolError, match="REQUEST_TOO_LARGE"):
        read_request(b"x" * 11, {}, max_bytes=10)


def test_messages_are_numbered_and_the_last_one_says_so():
    answer = Answer()
    messages = [
        answer.progress(Progress(state="loading", percent=41.23)),
        answer.chunk("Hel", ""),
        answer.chunk("lo", "hm"),
        answer.finished("stop", Usage(prompt_tokens=5, completion_tokens=2)),
    ]
    assert [json.loads(message) for message in messages] == [
        {"sequence": 0, "progress": {"state": "loading", "percent": 41.2}},
        {"sequence": 1, "text": "Hel"},
        {"sequence": 2, "text": "lo", "reasoning": "hm"},
        {
            "sequence": 3,
            "done": True,
            "finish_reason": "stop",
            "usage": {"prompt_tokens": 5, "completion_tokens": 2},
        },
    ]


def test_a_failure_is_a_last_message_with_its_reason_and_when_to_come_back():
    error = refuse(Reason.QUEUE_FULL, "later", retryable=True, retry_after_s=5, numbers={"running": 2})
    assert json.loads(Answer().failed(error)) == {
        "sequence": 0,
        "done": True,
        "error": {
            "reason": "QUEUE_FULL",
            "message": "later",
            "retry": "RETRYABLE",
            "retry_after_s": 5,
            "details": {"running": 2},
        },
    }
    assert json.loads(Answer().failed(BadParameterError("top_p", "no")))["error"]["param"] == "top_p"
