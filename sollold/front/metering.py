"""Counts the tokens of a stream for the key that pays for them.

Each frame of the engine's is charged as one token when it passes; at the end the engine's own count, which is in its
last frame whether or not the user asked for usage, takes the place of the estimate. A stream that ends early stays
charged with what was counted.
"""

from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec

from sollold.admission import BYTES_PER_TOKEN, Permit
from sollold.front.sse import DONE, EventReader
from sollold.streams import Dispatcher, EngineRequest, EngineStream, ProgressSink

# The last frame and the terminal event come in one chunk or two; perhaps the frame is cut.
_LAST_CHUNKS = 4


class Tally:
    """What a stream has taken so far. Pure."""

    def __init__(self, request: EngineRequest) -> None:
        self.charged = len(request.body) // BYTES_PER_TOKEN
        self._last: deque[bytes] = deque(maxlen=_LAST_CHUNKS)

    def feed(self, chunk: bytes) -> int:
        """Take a chunk; returns how many tokens it is charged with."""
        frames = chunk.count(b"data:")
        self._last.append(chunk)
        self.charged += frames
        return frames

    def settle(self) -> int:
        """What is still to be charged, or given back if below 0, by the engine's own count; 0 if it told none."""
        counts = (_tokens_in(data) for data in EventReader().feed(b"".join(self._last)))
        said = [count for count in counts if count is not None]
        rest = said[-1] - self.charged if said else 0
        self.charged += rest
        return rest


def _tokens_in(data: bytes) -> int | None:
    if data == DONE:
        return None
    try:
        frame = msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, ValueError):  # the tail of a frame whose beginning is in an earlier chunk
        return None
    usage, timings = frame.get("usage"), frame.get("timings")
    if isinstance(usage, Mapping):
        return _sum(usage, "prompt_tokens", "completion_tokens")
    if isinstance(timings, Mapping):
        return _sum(timings, "cache_n", "prompt_n", "predicted_n")
    return None


def _sum(counts: Mapping[str, Any], *names: str) -> int:
    return sum(count for name in names if isinstance(count := counts.get(name), int))


async def open_metered(
    dispatcher: Dispatcher, request: EngineRequest, on_progress: ProgressSink, permit: Permit
) -> EngineStream:
    """Open a stream on a permit.

    The prompt is paid for from now on, also by whoever leaves while it is read; not when the request is refused.
    """
    if not permit.is_metered:
        return await dispatcher.open(request, on_progress)
    tally = Tally(request)
    permit.charge(tally.charged)
    try:
        stream = await dispatcher.open(request, on_progress)
    except Exception:
        permit.charge(-tally.charged)
        raise
    if stream.status >= 400:
        permit.charge(-tally.charged)
        return stream
    return MeteredStream(stream, tally, permit)


class MeteredStream:
    """An engine's stream that charges a permit with what passes. See `EngineStream`."""

    def __init__(self, stream: EngineStream, tally: Tally, permit: Permit) -> None:
        self._stream, self._tally, self._permit = stream, tally, permit
        self.status, self.headers = stream.status, stream.headers
        self.model, self.node_id, self.instance_id = stream.model, stream.node_id, stream.instance_id

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._stream:
            self._permit.charge(self._tally.feed(chunk))
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()
        self._permit.charge(self._tally.settle())
