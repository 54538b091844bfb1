"""Builds the answer to a user who wanted no stream from the frames of the engine's stream. Pure.

Equal, field by field, to what llama-server answers when asked for no stream itself (a test compares them).
"""

from collections.abc import Mapping
from typing import Any

import msgspec
from sollol.errors import Reason, refuse
from sollol.inference import Piece, Usage

from sollold.front.openai import engine_refusal
from sollold.front.requests import CHAT_PATH
from sollold.front.sse import DONE


def frame_of(data: bytes) -> dict[str, Any] | None:
    """Read one event's data; None for the terminal event.

    Raises:
        SollolError: the engine reported an error in mid-stream, or sent what is no JSON object.
    """
    if data == DONE:
        return None
    try:
        frame = msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, ValueError) as error:
        raise refuse(Reason.INTERNAL, f"engine: sent an unreadable event: {error}") from None
    if "error" in frame:
        raise engine_refusal(500, frame)
    return frame


def piece_of(frame: Mapping[str, Any]) -> Piece:
    """Return the text that a frame of either route carries; empty for role, progress and tool call frames."""
    choices: list[dict[str, Any]] = frame.get("choices") or [{}]
    choice = choices[0]
    delta = choice.get("delta") or {}
    return Piece(
        text=choice.get("text") or delta.get("content") or "",
        reasoning=delta.get("reasoning_content") or "",
        finish_reason=choice.get("finish_reason") or "",
        usage=usage_of(frame),
    )


def usage_of(frame: Mapping[str, Any]) -> Usage | None:
    usage = frame.get("usage")
    if not usage:
        return None
    return Usage(prompt_tokens=usage["prompt_tokens"], completion_tokens=usage["completion_tokens"])


class Assembly:
    """Collects the frames of one stream. `complete` once the finish reason and the terminal event were seen."""

    def __init__(self, path: str) -> None:
        self._chat = path == CHAT_PATH
        self._envelope: dict[str, Any] = {}
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._tool_calls: dict[int, dict[str, Any]] = {}
        self._logprobs: list[Any] = []
        self._finish_reason: str | None = None
        self._done = False

    @property
    def complete(self) -> bool:
        return self._done and self._finish_reason is not None

    def feed(self, data: bytes) -> None:
        """Take the data of one event.

        Raises:
            SollolError: the engine reported an error in mid-stream, or sent what is no JSON object.
        """
        frame = frame_of(data)
        if frame is None:
            self._done = True
            return
        for name in ("id", "created", "model", "system_fingerprint", "usage", "timings"):
            if frame.get(name) is not None:
                self._envelope[name] = frame[name]
        for choice in frame.get("choices") or ():
            self._take(choice)

    def _take(self, choice: Mapping[str, Any]) -> None:
        delta = choice.get("delta") or {}
        self._text.append(choice.get("text") or delta.get("content") or "")
        self._reasoning.append(delta.get("reasoning_content") or "")
        self._logprobs.extend((choice.get("logprobs") or {}).get("content") or ())
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        for call in delta.get("tool_calls") or ():
            self._merge(call)

    def _merge(self, call: Mapping[str, Any]) -> None:
        whole = self._tool_calls.setdefault(call.get("index", 0), {"type": "function", "function": {}})
        for name, text in (call.get("function") or {}).items():
            whole["function"][name] = whole["function"].get(name, "") + text
        for name in ("id", "type"):
            if call.get(name):
                whole[name] = call[name]

    def result(self) -> dict[str, Any]:
        """Return the body of the answer; only when `complete`."""
        answer: dict[str, Any] = {"index": 0, "finish_reason": self._finish_reason}
        logprobs = {"content": self._logprobs} if self._logprobs else None
        if self._chat:
            answer["message"] = self._message()
            if logprobs:
                answer["logprobs"] = logprobs
        else:
            answer |= {"text": "".join(self._text), "logprobs": logprobs}
        return {"object": "chat.completion" if self._chat else "text_completion", "choices": [answer], **self._envelope}

    def _message(self) -> dict[str, Any]:
        text, reasoning = "".join(self._text), "".join(self._reasoning)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if reasoning:
            message["reasoning_content"] = reasoning
        if self._tool_calls:
            message["content"] = text or None
            message["tool_calls"] = [self._tool_calls[index] for index in sorted(self._tool_calls)]
        return message
