import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sollol.errors import Reason, SollolError

from sollold.front import requests

HI = [{"role": "user", "content": "hi"}]


def chat(**more):
    return requests.chat({"model": "tiny", "messages": HI, **more})


def sent(asked):
    return json.loads(asked.engine.body)


def refusal_of(check, body):
    with pytest.raises(SollolError) as caught:
        check(body)
    return caught.value.refusal


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"temperature": "hot"}, "temperature: expected a number between 0 and 5, got 'hot'"),
        ({"temperature": -1}, "temperature: expected a number between 0 and 5, got -1"),
        ({"temperature": True}, "temperature: expected a number between 0 and 5, got true"),
        ({"temperature": float("nan")}, "temperature: expected a number between 0 and 5, got nan"),
        ({"temperature": 10**400}, "temperature: expected a number between 0 and 5, got 1"),
        ({"top_p": 1.5}, "top_p: expected a number between 0 and 1, got 1.5"),
        ({"top_k": -3}, "top_k: expected a whole number"),
        ({"top_k": 1.5}, "top_k: expected a whole number"),
        ({"max_tokens": 0}, "max_tokens: expected a whole number between 1 and"),
        ({"max_tokens": -1}, "max_tokens: expected a whole number between 1 and"),
        ({"max_completion_tokens": 2**40}, "max_completion_tokens: expected a whole number"),
        ({"seed": "x"}, "seed: expected a whole number"),
        ({"n": 2}, "n: only 1 answer per request is supported, got 2"),
        ({"n": 0}, "n: expected a whole number"),
        ({"stop": ["a"] * 17}, "stop: expected 0 to 16 items, got 17"),
        ({"stop": [1]}, "stop[0]: expected a string, got 1"),
        ({"stop": {}}, "stop: expected a list, got an object"),
        ({"stream": "yes"}, "stream: expected true or false, got 'yes'"),
        ({"stream_options": []}, "stream_options: expected an object, got a list"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage: expected true or false"),
        ({"logit_bias": {"x": 1}}, "logit_bias: expected token ids as keys, got 'x'"),
        ({"logit_bias": {"5": "x"}}, "logit_bias.5: expected a number"),
        ({"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias: expected at most 1024 tokens"),
        ({"top_logprobs": 3}, "top_logprobs: needs `logprobs: true`"),
        ({"logprobs": 3}, "logprobs: expected true or false"),
        ({"response_format": {"type": "xml"}}, "response_format.type: expected 'text' or 'json_object'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema: is missing"),
        ({"tool_choice": "required"}, "tool_choice: needs `tools`"),
        ({"tools": [{"type": "function"}]}, "tools[0].function: is missing"),
        ({"tools": [{"type": "web", "function": {}}]}, "tools[0].type: expected 'function'"),
        ({"messages": None}, "messages: is missing"),
        ({"messages": []}, "messages: expected 1 to 4096 items, got 0"),
        ({"messages": HI * 4097}, "messages: expected 1 to 4096 items, got 4097"),
        ({"messages": "hi"}, "messages: expected a list, got 'hi'"),
        ({"messages": ["hi"]}, "messages[0]: expected an object, got 'hi'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: is missing"),
        ({"messages": [{"role": "root", "content": ""}]}, "messages[0].role: expected 'system' or"),
        ({"messages": [*HI, {"role": "user", "content": 5}]}, "messages[1].content: expected a string or a list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
            "messages[0].content[0].type: only 'text' parts are supported, got 'image_url'",
        ),
        ({"model": None}, "model: is missing"),
        ({"model": 5}, "model: expected a string, got 5"),
    ],
)
def test_a_wrong_parameter_is_one_refusal_that_names_it(more, message):
    refusal = refusal_of(requests.chat, {"model": "tiny", "messages": HI, **more})
    assert refusal.reason is Reason.INVALID_REQUEST
    assert refusal.message.startswith(message)
    assert len(refusal.message) < 300


@pytest.mark.parametrize("name", ["../etc/passwd", "a\0b", "x" * 10_000, ""])
def test_a_wrong_model_name_is_refused_as_such(name):
    assert refusal_of(chat_of, name).reason is Reason.INVALID_MODEL_NAME


def chat_of(name):
    return requests.chat({"model": name, "messages": HI})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"prompt": None}, "prompt: is missing"),
        ({"prompt": ["a", "b"]}, "prompt: one prompt per request is supported, got 2"),
        ({"prompt": []}, "prompt: expected 1 to"),
        ({"prompt": [1, -1]}, "prompt[1]: expected a whole number"),
        ({"prompt": {"a": 1}}, "prompt: expected a string or a list of token ids, got an object"),
        ({"prompt": "a", "suffix": "b"}, "suffix: is not supported"),
        ({"prompt": "a", "echo": True}, "echo: is not supported"),
        ({"prompt": "a", "best_of": 3}, "best_of: only 1 answer"),
        ({"prompt": "a", "logprobs": True}, "logprobs: expected a whole number"),
    ],
)
def test_a_wrong_completion_is_one_refusal_that_names_it(more, message):
    assert refusal_of(requests.completion, {"model": "tiny", **more}).message.startswith(message)


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[1]", b"null", b'{"a": NaN}', b'{"a": 1e999}', b'{"a":' * 5000, b'{"a":"\xff"}', b'{"a":"\\ud800"}',
     b'{"a":' + b"9" * 6000 + b"}", b"{}{}"],
)  # fmt: skip
def test_what_is_not_a_json_object_is_refused(raw):
    assert refusal_of(requests.decode_body, raw).reason is Reason.INVALID_REQUEST


@pytest.mark.parametrize("evil", [b"[]", b"{}", b'{"a":[]}', b"0", b"[0]"])
def test_a_body_of_millions_of_tiny_parts_is_refused_before_it_is_read(evil):
    raw = b'{"x":[' + b",".join([evil] * (8_000_000 // len(evil))) + b"]}"

    assert refusal_of(requests.decode_body, raw).reason is Reason.REQUEST_TOO_LARGE


def test_a_long_text_full_of_brackets_and_commas_is_none_of_these():
    raw = json.dumps({"model": "tiny", "prompt": "f(a, [b, {c}]), " * 40_000}).encode()

    assert requests.completion(requests.decode_body(raw)).engine.model == "tiny"


def test_the_engine_always_streams_and_counts_when_the_user_wants_no_stream():
    asked = chat(stream=False, stream_options={"include_usage": False})
    assert not asked.stream
    assert sent(asked)["stream"] is True
    assert sent(asked)["stream_options"] == {"include_usage": True}


def test_a_streaming_users_own_stream_options_are_kept():
    assert sent(chat(stream=True))["stream_options"] == {}
    assert sent(chat(stream=True, stream_options={"include_usage": True}))["stream_options"] == {"include_usage": True}


def test_only_known_fields_reach_the_engine():
    asked = chat(n_predict=-1, id_slot=3, lora=[], grammar="root ::= x", user="me", verbose=True, n=1, temperature=0)
    assert set(sent(asked)) == {"model", "messages", "stream", "stream_options", "temperature"}


def test_null_means_absent():
    assert set(sent(chat(temperature=None, stop=None, tools=None, stream=None, n=None))) == {
        "model", "messages", "stream", "stream_options",
    }  # fmt: skip


def test_stop_seed_and_developer_are_turned_into_the_engines_forms():
    body = sent(
        requests.chat(
            {
                "model": "tiny",
                "stop": "end",
                "seed": -1,
                "messages": [{"role": "developer", "content": "be brief"}, *HI],
            }
        )
    )
    assert body["stop"] == ["end"]
    assert body["seed"] == 2**32 - 1
    assert body["messages"][0] == {"role": "system", "content": "be brief"}


def test_a_conversation_with_tool_calls_is_kept():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "42"}]}]  # fmt: skip
    assert sent(chat(messages=messages))["messages"] == messages


def test_a_choice_of_one_function_offers_only_that_one_and_requires_a_call():
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("f", "g")]
    body = sent(chat(tools=tools, tool_choice={"type": "function", "function": {"name": "g"}}))
    assert body["tools"] == tools[1:]
    assert body["tool_choice"] == "required"
    with pytest.raises(SollolError, match="names no function"):
        chat(tools=tools, tool_choice={"type": "function", "function": {"name": "h"}})


def test_prompts_may_be_text_or_tokens_alone_or_as_the_only_item_of_a_list():
    for given_prompt, kept in [("a", "a"), (["a"], "a"), ([1, 2], [1, 2]), ([[1, 2]], [1, 2]), ("", "")]:
        assert sent(requests.completion({"model": "tiny", "prompt": given_prompt}))["prompt"] == kept


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(
    [*requests._CHAT, *requests._COMPLETION, "messages", "prompt", "tools", "tool_choice", "n", "model"]
)


@given(
    st.dictionaries(names, json_values, max_size=5),
    st.sampled_from([requests.chat, requests.completion]),
    st.booleans(),
)
def test_whatever_the_fields_hold_a_request_is_sent_or_refused(body, check, complete):
    if complete:
        body = {"messages": HI, "prompt": "x", **body, "model": "tiny"}
    try:
        asked = check(body)
    except SollolError as error:
        reason = error.refusal.reason
    else:
        reason = None
        assert sent(asked)["stream"] is True
    assert reason in {None, Reason.INVALID_REQUEST, Reason.INVALID_MODEL_NAME}
