import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sollol.errors import Reason, SollolError

from sollold.front.assemble import Assembly
from sollold.front.requests import CHAT_PATH, COMPLETION_PATH
from sollold.front.sse import EventReader
from tests.fakes.fake_dispatcher import DONE, HELLO, HELLO_TEXT, USAGE, chat_frame


def assembled(path, *chunks):
    reader, assembly = EventReader(), Assembly(path)
    for chunk in chunks:
        for data in reader.feed(chunk):
            assembly.feed(data)
    return assembly


def test_a_chat_becomes_one_answer():
    assembly = assembled(CHAT_PATH, *HELLO)
    assert assembly.complete
    assert assembly.result() == {
        "object": "chat.completion",
        "id": "chatcmpl-1",
        "created": 7,
        "model": "tiny",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Hello ✓"}}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
    }


def test_a_completion_becomes_one_answer():
    result = assembled(COMPLETION_PATH, *HELLO_TEXT).result()
    assert result["object"] == "text_completion"
    assert result["choices"] == [{"index": 0, "text": "Hello", "finish_reason": "length", "logprobs": None}]


@given(st.lists(st.integers(0, 5000), max_size=20))
def test_the_answer_is_the_same_however_the_stream_is_cut(places):
    body = b"".join(HELLO)
    bounds = [0, *sorted(place % len(body) for place in places), len(body)]
    chunks = [body[start:end] for start, end in itertools.pairwise(bounds)]
    assert assembled(CHAT_PATH, *chunks).result() == assembled(CHAT_PATH, *HELLO).result()


def test_tool_calls_are_merged_by_index():
    def call(index, **function):
        return chat_frame({"tool_calls": [{"index": index, "function": function}]})

    first = chat_frame(
        {"tool_calls": [{"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": ""}}]}
    )
    second = chat_frame(
        {"tool_calls": [{"index": 1, "id": "b", "type": "function", "function": {"name": "g", "arguments": "{"}}]}
    )
    result = assembled(
        CHAT_PATH, first, call(0, arguments='{"x"'), second, call(0, arguments=":1}"), call(1, arguments="}"),
        chat_frame({}, "tool_calls"), DONE,
    ).result()  # fmt: skip
    choice = result["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}},
            {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }


def test_reasoning_and_log_probabilities_are_collected():
    one = chat_frame({"reasoning_content": "hm"})
    two = json.loads(chat_frame({"content": "a"})[6:])
    two["choices"][0]["logprobs"] = {"content": [{"token": "a", "logprob": -1.0}]}
    three = b"data: " + json.dumps(two).encode() + b"\n\n"
    choice = assembled(CHAT_PATH, one, three, three, chat_frame({}, "length"), DONE).result()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "aa", "reasoning_content": "hm"}
    assert choice["logprobs"] == {"content": [{"token": "a", "logprob": -1.0}] * 2}


@pytest.mark.parametrize("chunks", [(), HELLO[:-1], (DONE,), (*HELLO[:3], USAGE, DONE)])
def test_without_finish_reason_or_terminal_event_an_answer_is_not_complete(chunks):
    assert not assembled(CHAT_PATH, *chunks).complete


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (b'data: {"error":{"code":500,"message":"Compute error.","type":"server_error"}}\n\n', Reason.INTERNAL),
        (b'data: {"error":{"code":400,"message":"m","type":"invalid_request_error"}}\n\n', Reason.INVALID_REQUEST),
        (b"data: {not json\n\n", Reason.INTERNAL),
        (b"data: [1]\n\n", Reason.INTERNAL),
    ],
)
def test_an_error_in_mid_stream_is_raised(event, reason):
    with pytest.raises(SollolError) as caught:
        assembled(CHAT_PATH, *HELLO[:2], event)
    assert caught.value.refusal.reason is reason
