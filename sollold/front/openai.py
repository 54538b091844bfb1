"""Errors and listings in the forms that OpenAI's clients read, and engine errors in ours. Pure."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from sollol.errors import SURFACES, Reason, Refusal, SollolError, refuse

from sollold.front.checks import BadParameterError
from sollold.streams import AvailableModel

# When nothing better is known: long enough not to hammer, short enough for a person.
_DEFAULT_RETRY_AFTER_S = 5


def envelope(error: SollolError) -> dict[str, Any]:
    """Return `{"error": {...}}`: OpenAI's four fields, and ours: retry, retry_after_s, details, log_lines."""
    refusal = error.refusal
    content: dict[str, Any] = {
        "message": refusal.message,
        "type": SURFACES[refusal.reason].openai_type,
        "code": refusal.reason.value,
        "param": error.param if isinstance(error, BadParameterError) else None,
        "retry": refusal.retry.value,
    }
    if refusal.retry_after_s is not None:  # in mid-stream there are no headers to say it
        content["retry_after_s"] = refusal.retry_after_s
    if refusal.numbers:
        content["details"] = refusal.numbers
    if refusal.log_lines:
        content["log_lines"] = list(refusal.log_lines)
    return {"error": content}


def retry_after(refusal: Refusal, status: int) -> str | None:
    """Return the value of the Retry-After header: always there on 503, elsewhere when a time is known."""
    if refusal.retry_after_s is not None:
        return str(max(1, math.ceil(refusal.retry_after_s)))
    return str(_DEFAULT_RETRY_AFTER_S) if status == 503 else None


def read_engine_error(status: int, body: bytes) -> SollolError:
    """Return what an engine's HTTP error (status >= 400) means to the user."""
    try:
        content = msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, ValueError):
        content = {"error": {"message": body[:200].decode(errors="replace")}}
    return engine_refusal(status, content)


def engine_refusal(status: int, content: Mapping[str, Any]) -> SollolError:
    """Return what llama-server's `{"error": {"code", "message", "type"}}` means to the user."""
    found = content.get("error")
    error = found if isinstance(found, dict) else {"message": str(found)}
    kind, message = error.get("type"), str(error.get("message") or f"HTTP {status} without a message")
    if kind == "exceed_context_size_error":
        return _context_too_long(error)
    if kind == "unavailable_error":
        return refuse(Reason.INSTANCE_NOT_READY, f"engine: {message}", retryable=True, retry_after_s=1)
    if kind in ("invalid_request_error", "not_supported_error"):
        return refuse(Reason.INVALID_REQUEST, f"engine: {message}")
    return refuse(Reason.INTERNAL, f"engine: {message}")


def _context_too_long(error: Mapping[str, Any]) -> SollolError:
    numbers = {name: int(error[name]) for name in ("n_prompt_tokens", "n_ctx") if isinstance(error.get(name), int)}
    prompt, context = numbers.get("n_prompt_tokens", "?"), numbers.get("n_ctx", "?")
    return refuse(
        Reason.CONTEXT_TOO_LONG,
        f"the prompt has {prompt} tokens, a request has room for {context} (n_prompt_tokens={prompt}, n_ctx={context}):"
        " shorten it, or load the model with a larger context",
        numbers=numbers,
    )


def model_entry(model: AvailableModel) -> dict[str, Any]:
    """Return one entry of /v1/models; what OpenAI's form has no field for is under `sollol`."""
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": "sollol",
        "sollol": {name: value for name, value in msgspec.to_builtins(model).items() if name != "name"},
    }


def model_list(models: Iterable[AvailableModel]) -> dict[str, Any]:
    return {"object": "list", "data": [model_entry(model) for model in models]}


def find_model(models: Iterable[AvailableModel], name: str) -> AvailableModel | None:
    return next((model for model in models if name == model.name or name in model.aliases), None)
