"""A device's request over MQTT, and the messages that answer it. Pure; README.md documents their fields."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from sollol.errors import Reason, SollolError, refuse
from sollol.inference import Progress, Usage

from sollold.front import requests
from sollold.front.checks import BadParameterError, expected

API_KEY = "api_key"
SENT_AS = f"the user property `{API_KEY}`, or as the body's `{API_KEY}`"
PACKET_BYTES = 65_536  # of a message that is no request, or what a request carries beside its body
MOST_PACKET_BYTES = 268_435_455  # MQTT's own
# How the answer travels is not the asker's to say: always in pieces, always with usage.
_IGNORED = ("stream", "stream_options")
# Answers are text: what else these would bring is not left out in silence.
_NOT_CARRIED = ("tools", "logprobs")


@dataclass(frozen=True, slots=True)
class Wanted:
    """`token`: the API key that came with it, in a user property or in the body."""

    asked: requests.Asked
    token: str | None


def packet_bytes(max_body_bytes: int) -> int:
    """Room for a request of the largest size and more, so that it is refused with a word, and not by the broker."""
    return min(max_body_bytes + PACKET_BYTES, MOST_PACKET_BYTES)


def read_request(payload: bytes, user: Mapping[str, str], *, max_bytes: int) -> Wanted:
    """Check a request as HTTP's are checked.

    Raises:
        SollolError: INVALID_REQUEST, INVALID_MODEL_NAME or REQUEST_TOO_LARGE.
    """
    if len(payload) > max_bytes:
        raise refuse(
            Reason.REQUEST_TOO_LARGE, f"payload: larger than {max_bytes} bytes", numbers={"max_body_bytes": max_bytes}
        )
    body = requests.decode_body(payload)
    token = body.pop(API_KEY, None)
    if token is not None and not isinstance(token, str):
        raise expected(API_KEY, "a string", "***")
    for name in _IGNORED:
        body.pop(name, None)
    for name in _NOT_CARRIED:
        if not (body.get(name) in (None, []) or body[name] is False):
            raise BadParameterError(name, "answers over MQTT carry text only; ask over HTTP")
    if ("messages" in body) == ("prompt" in body):
        raise BadParameterError("messages", "expected either `messages` or `prompt`")
    asked = requests.chat(body) if "messages" in body else requests.completion(body)
    return Wanted(asked=asked, token=user.get(API_KEY) or token)


class Answer:
    """The messages of one answer, numbered from 0; the one with `done` is the last.

    Attributes:
        ended: Whether there was one that says how it finished.
    """

    def __init__(self) -> None:
        self._sequence = 0
        self.ended = False

    def progress(self, progress: Progress) -> bytes:
        """What the request waits for: `state` and `percent`."""
        return self._message(progress={"state": progress.state, "percent": round(progress.percent, 1)})

    def chunk(self, text: str, reasoning: str) -> bytes:
        return self._message(**{name: value for name, value in (("text", text), ("reasoning", reasoning)) if value})

    def finished(self, finish_reason: str, usage: Usage | None) -> bytes:
        self.ended = True
        return self._message(done=True, finish_reason=finish_reason, usage=usage or Usage())

    def failed(self, error: SollolError) -> bytes:
        """The last message of one that was refused or cut short; what was said before stands."""
        refusal = error.refusal
        content: dict[str, Any] = {
            "reason": refusal.reason,
            "message": refusal.message,
            "retry": refusal.retry,
            "retry_after_s": refusal.retry_after_s,
        }
        if refusal.numbers:
            content["details"] = refusal.numbers
        if isinstance(error, BadParameterError):
            content["param"] = error.param
        return self._message(done=True, error=content)

    def _message(self, **content: Any) -> bytes:
        message = msgspec.json.encode({"sequence": self._sequence, **content})
        self._sequence += 1
        return message
