"""A dispatcher and a catalogue for tests of the front: what they answer is scripted, what became of it is recorded."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from sollold.streams import AvailableModel, EngineRequest, ProgressSink

MODEL = AvailableModel(
    name="tiny", size_bytes=3_000_000, node_ids=("node-a",), architecture="llama", aliases=("tiny:latest",)
)


def chat_frame(delta: dict, finish_reason: str | None = None, **more: object) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return sse(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 7,
            "model": "tiny",
            "choices": [choice],
            **more,
        }
    )


def sse(content: object) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
USAGE = sse(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 7,
        "model": "tiny",
        "choices": [],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
    }
)
HELLO = (
    chat_frame({"role": "assistant", "content": None}),
    chat_frame({"content": "Hel"}),
    chat_frame({"content": "lo ✓"}),
    chat_frame({}, "stop"),
    USAGE,
    DONE,
)
HELLO_TEXT = (
    sse(
        {
            "id": "cmpl-1",
            "object": "text_completion",
            "created": 7,
            "model": "tiny",
            "choices": [{"index": 0, "text": "Hello", "finish_reason": None}],
        }
    ),
    sse(
        {
            "id": "cmpl-1",
            "object": "text_completion",
            "created": 7,
            "model": "tiny",
            "choices": [{"index": 0, "text": "", "finish_reason": "length"}],
            "usage": {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6},
        }
    ),
    DONE,
)


@dataclass(eq=False)
class FakeStream:
    """Yields `chunks`; then raises `error`, or waits for ever if `hangs`."""

    chunks: tuple[bytes, ...] = HELLO
    error: Exception | None = None
    hangs: bool = False
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=lambda: {"content-type": "text/event-stream"})
    model: str = "tiny"
    node_id: str = "node-a"
    instance_id: str = "pool-0"
    closed: bool = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self.chunks:
            yield chunk
            await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        if self.hangs:
            await asyncio.Event().wait()

    async def aclose(self) -> None:
        self.closed = True


Opening = Callable[[EngineRequest, ProgressSink], Awaitable[FakeStream]]


class FakeDispatcher:
    """Opens `answer`: a stream, an error to raise, or a function that opens one; records requests and cancellations.

    `queues`: no engine is given the request before the function has returned.
    """

    def __init__(self, answer: FakeStream | Exception | Opening | None = None, *, queues: bool = False) -> None:
        self.queues = queues
        self.answer: FakeStream | Exception | Opening = answer if answer is not None else FakeStream()
        self.requests: list[EngineRequest] = []
        self.cancelled = 0

    async def open(self, request: EngineRequest, on_progress: ProgressSink, on_sent: Callable[[], None]) -> FakeStream:
        self.requests.append(request)
        if not self.queues:
            on_sent()
        if isinstance(self.answer, Exception):
            raise self.answer
        if isinstance(self.answer, FakeStream):
            return self.answer
        try:
            return await self.answer(request, on_progress)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


class FakeCatalogue:
    def __init__(self, *models: AvailableModel) -> None:
        self.available = models

    def models(self) -> tuple[AvailableModel, ...]:
        return self.available

    def ready(self) -> bool:
        return bool(self.available)
