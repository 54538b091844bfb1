"""Turns a user's request into the engine's, or into one clear INVALID_REQUEST. Pure.

An allow-list: what is not named here never reaches the engine, because some of its parameters have teeth (a slot to
take, a file to load, generation without end) and because it answers malformed input with 500.
"""

from dataclasses import dataclass
from typing import Any

import msgspec
from sollol.errors import Reason, refuse
from sollol.names import check_model_name

from sollold.front.checks import (
    BadParameterError,
    Check,
    boolean,
    expected,
    fields,
    integer,
    mapping,
    number,
    one_of,
    required,
    sequence,
)
from sollold.front.checks import text as string
from sollold.front.messages import TOKEN_IDS, logit_bias, messages, offer_tools, response_format
from sollold.streams import EngineRequest

CHAT_PATH = "/v1/chat/completions"
COMPLETION_PATH = "/v1/completions"

_INT32_MAX = 2**31 - 1
# Each costs some 80 and 40 bytes once it is read, and time in which every stream stands still: a body of nothing else
# would take a gigabyte. No context holds as many, not even as punctuation of a text.
_MOST_CONTAINERS, _MOST_ITEMS = 200_000, 2_000_000


@dataclass(frozen=True, slots=True)
class Asked:
    """A valid request: what the engine is sent, and whether the user wants a stream."""

    engine: EngineRequest
    stream: bool


def decode_body(raw: bytes) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        SollolError: INVALID_REQUEST, REQUEST_TOO_LARGE. Strict: no NaN, no comments, valid UTF-8, bounded nesting.
    """
    if raw.count(b"[") + raw.count(b"{") > _MOST_CONTAINERS or raw.count(b",") > _MOST_ITEMS:
        raise refuse(
            Reason.REQUEST_TOO_LARGE,
            f"body: more than {_MOST_CONTAINERS} lists and objects, or more than {_MOST_ITEMS} items",
        )
    try:
        body = msgspec.json.decode(raw)
    except RecursionError:
        raise refuse(Reason.INVALID_REQUEST, "body: nested too deeply") from None
    except (msgspec.DecodeError, ValueError) as error:  # ValueError: not UTF-8, or a number of thousands of digits
        raise refuse(Reason.INVALID_REQUEST, f"body: expected JSON: {error}") from None
    if not isinstance(body, dict):
        raise expected("body", "a JSON object", body)
    return body


def chat(body: dict[str, Any]) -> Asked:
    """Check the body of a chat completion."""
    kept = {"messages": required("", body, "messages", messages), **_common(body, _CHAT), **offer_tools(body)}
    if "top_logprobs" in kept and not kept.get("logprobs"):
        raise BadParameterError("top_logprobs", "needs `logprobs: true`")
    if not kept.get("logprobs"):
        kept.pop("logprobs", None)
    elif kept.get("top_logprobs") == 0:
        kept["top_logprobs"] = 1  # the engine takes 0 for "no log probabilities at all"
    if "logprobs" in kept and "tools" in kept:
        raise BadParameterError("logprobs", "cannot be combined with `tools`")
    return _asked(CHAT_PATH, body, kept)


def completion(body: dict[str, Any]) -> Asked:
    """Check the body of a raw completion."""
    for name in ("suffix", "echo"):
        if body.get(name):
            raise BadParameterError(name, "is not supported")
    kept = {"prompt": required("", body, "prompt", _prompt), **_common(body, _COMPLETION)}
    return _asked(COMPLETION_PATH, body, kept)


def _prompt(param: str, value: Any) -> str | list[int]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        raise BadParameterError(param, f"one prompt per request is supported, got {len(value)}")
    if isinstance(value, list):
        tokens: list[int] = TOKEN_IDS(param, value)
        return tokens
    raise expected(param, "a string or a list of token ids", value)


def _stop(param: str, value: Any) -> list[str]:
    if isinstance(value, str):
        value = [value]
    words: list[str] = sequence(0, 16, string)(param, value)
    return [word for word in words if word]


def _seed(param: str, value: Any) -> int:
    # The engine's seed has 32 bits, and all ones (-1) mean a random one.
    return int(integer(-(2**63), 2**63 - 1)(param, value)) % 2**32


def _stream_options(param: str, value: Any) -> dict[str, Any]:
    return fields(param, mapping(param, value), {"include_usage": boolean})


_SAMPLING: dict[str, Check] = {
    "temperature": number(0, 5),
    "top_p": number(0, 1),
    "top_k": integer(0, _INT32_MAX),
    "min_p": number(0, 1),
    "typical_p": number(0, 1),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "repeat_penalty": number(0, 10),
    "repeat_last_n": integer(0, 65_536),
    "max_tokens": integer(1, _INT32_MAX),
    "seed": _seed,
    "stop": _stop,
    "logit_bias": logit_bias,
    "cache_prompt": boolean,
    "stream_options": _stream_options,
}
_CHAT: dict[str, Check] = {
    **_SAMPLING,
    "max_completion_tokens": integer(1, _INT32_MAX),
    "logprobs": boolean,
    "top_logprobs": integer(0, 20),
    "response_format": response_format,
    "chat_template_kwargs": mapping,
    "reasoning_effort": one_of("none", "minimal", "low", "medium", "high", "xhigh"),
    "reasoning_format": one_of("none", "auto", "deepseek", "deepseek-legacy"),
}
_COMPLETION: dict[str, Check] = {**_SAMPLING, "logprobs": integer(0, 20)}


def _common(body: dict[str, Any], checks: dict[str, Check]) -> dict[str, Any]:
    for name in ("n", "best_of"):
        if body.get(name) is not None and integer(1, _INT32_MAX)(name, body[name]) != 1:
            raise BadParameterError(name, f"only 1 answer per request is supported, got {body[name]}")
    return fields("", body, checks)


def _asked(path: str, body: dict[str, Any], kept: dict[str, Any]) -> Asked:
    model = required("", body, "model", string)
    check_model_name(model)
    stream = fields("", body, {"stream": boolean}).get("stream", False)
    options = kept.pop("stream_options", {})
    if not stream:
        options = {"include_usage": True}
    # Always a stream towards the engine: only then does it notice at once that nobody reads any more.
    kept |= {"model": model, "stream": True, "stream_options": options}
    return Asked(engine=EngineRequest(model=model, path=path, body=msgspec.json.encode(kept)), stream=stream)
