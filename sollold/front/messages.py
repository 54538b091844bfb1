"""Checks of a conversation and of the tools offered to the model. Pure."""

from typing import Any

from sollold.front.checks import (
    BadParameterError,
    Check,
    boolean,
    expected,
    fields,
    integer,
    mapping,
    one_of,
    required,
    sequence,
)
from sollold.front.checks import text as string

MAX_MESSAGES = 4096
MAX_PARTS = 4096
MAX_TOOLS = 128

_ROLES = ("system", "developer", "user", "assistant", "tool")


def messages(param: str, value: Any) -> list[dict[str, Any]]:
    """Check a conversation; what is returned has only the fields that chat templates know."""
    checked: list[dict[str, Any]] = sequence(1, MAX_MESSAGES, _message)(param, value)
    return checked


def _message(param: str, value: Any) -> dict[str, Any]:
    message = mapping(param, value)
    role = required(param, message, "role", one_of(*_ROLES))
    kept = fields(param, message, {"name": string, "tool_call_id": string})
    if role == "assistant":
        kept |= fields(param, message, {"tool_calls": _TOOL_CALLS, "reasoning_content": string})
    # Templates know no developer; it is what newer clients call the system.
    kept["role"] = "system" if role == "developer" else role
    if message.get("content") is not None or not kept.get("tool_calls"):
        kept["content"] = required(param, message, "content", _content)
    else:
        kept["content"] = None
    return kept


def _content(param: str, value: Any) -> str | list[dict[str, str]]:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        parts: list[dict[str, str]] = sequence(1, MAX_PARTS, _part)(param, value)
        return parts
    raise expected(param, "a string or a list of text parts", value)


def _part(param: str, value: Any) -> dict[str, str]:
    part = mapping(param, value)
    kind = required(param, part, "type", string)
    if kind != "text":
        raise BadParameterError(f"{param}.type", f"only 'text' parts are supported, got {kind[:40]!r}")
    return {"type": "text", "text": required(param, part, "text", string)}


def _tool_call(param: str, value: Any) -> dict[str, Any]:
    call = mapping(param, value)
    function = required(param, call, "function", mapping)
    path = f"{param}.function"
    return {
        **fields(param, call, {"id": string}),
        "type": "function",
        "function": {
            "name": required(path, function, "name", string),
            "arguments": required(path, function, "arguments", string),
        },
    }


_TOOL_CALLS = sequence(0, MAX_TOOLS, _tool_call)


def _tool(param: str, value: Any) -> dict[str, Any]:
    tool = mapping(param, value)
    required(param, tool, "type", one_of("function"))
    function = required(param, tool, "function", mapping)
    path = f"{param}.function"
    checks: dict[str, Check] = {"description": string, "parameters": mapping, "strict": boolean}
    return {
        "type": "function",
        "function": {"name": required(path, function, "name", string), **fields(path, function, checks)},
    }


def offer_tools(body: dict[str, Any]) -> dict[str, Any]:
    """Check `tools`, `tool_choice` and `parallel_tool_calls` of a request.

    The engine knows no choice of one function by name: the others are left out and a call is required instead, which
    means the same.
    """
    tools = fields("", body, {"tools": sequence(0, MAX_TOOLS, _tool)}).get("tools") or []
    choice = body.get("tool_choice")
    if not tools:
        if choice not in (None, "none", "auto"):
            raise BadParameterError("tool_choice", "needs `tools` to choose from")
        return {}
    kept: dict[str, Any] = {"tools": tools, **fields("", body, {"parallel_tool_calls": boolean})}
    if isinstance(choice, dict):
        function = required("tool_choice", choice, "function", mapping)
        name = required("tool_choice.function", function, "name", string)
        kept["tools"] = [tool for tool in tools if tool["function"]["name"] == name]
        if not kept["tools"]:
            raise BadParameterError("tool_choice.function.name", f"names no function of `tools`: {name[:60]!r}")
        kept["tool_choice"] = "required"
    elif choice is not None:
        kept["tool_choice"] = one_of("none", "auto", "required")("tool_choice", choice)
    return kept


def response_format(param: str, value: Any) -> dict[str, Any]:
    asked = mapping(param, value)
    kind = required(param, asked, "type", one_of("text", "json_object", "json_schema"))
    if kind == "json_object":
        return {"type": kind, **fields(param, asked, {"schema": mapping})}
    if kind == "json_schema":
        schema = required(param, asked, "json_schema", mapping)
        required(f"{param}.json_schema", schema, "schema", mapping)
        return {"type": kind, "json_schema": schema}
    return {"type": kind}


def logit_bias(param: str, value: Any) -> dict[str, float]:
    """Check a map of token ids, written as strings, to numbers between -100 and 100."""
    biases = mapping(param, value)
    if len(biases) > 1024:
        raise BadParameterError(param, f"expected at most 1024 tokens, got {len(biases)}")
    for token, bias in biases.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise expected(param, "token ids as keys", token)
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise expected(f"{param}.{token}", "a number between -100 and 100", bias)
    return biases


TOKEN_IDS = sequence(1, 1_048_576, integer(0, 2**31 - 1))
