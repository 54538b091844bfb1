"""Counts the tokens of a stream: for the key that pays for them, and for the metrics.

Each frame of the engine's is charged as one token when it passes; at the end the engine's own count, which is in its
last frame whether or not the user asked for usage, takes the place of the estimate. A stream that ends early stays
charged with what was counted.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec
from msgspec import Struct

from sollold.admission import BYTES_PER_TOKEN, Permit
from sollold.front.sse import DONE, EventReader
from sollold.metrics import Account
from sollold.streams import Dispatcher, EngineRequest, EngineStream, ProgressSink

# The last frame and the terminal event come in one chunk or two; perhaps the frame is cut.
_LAST_CHUNKS = 4
_TERMINAL = b"data: %s\n\n" % DONE


class Tokens(Struct, frozen=True):
    prompt: int
    generated: int


class Tally:
    """What a stream has taken so far. Pure."""

    def __init__(self, request: EngineRequest) -> None:
        self._prompt = len(request.body) // BYTES_PER_TOKEN
        self._generated = 0
        self._last: deque[bytes] = deque(maxlen=_LAST_CHUNKS)

    @property
    def tokens(self) -> Tokens:
        return Tokens(self._prompt, self._generated)

    @property
    def charged(self) -> int:
        return self._prompt + self._generated

    def feed(self, chunk: bytes) -> int:
        """Take a chunk; returns how many tokens it is charged with."""
        frames = chunk.count(b"data:")
        self._last.append(chunk)
        self._generated += frames
        return frames

    @property
    def ended(self) -> bool:
        """Whether the terminal event is here, as a whole; a relay that waits for credit cuts it like anything else."""
        last = self._last[-1]
        return (last if len(last) >= len(_TERMINAL) else b"".join(self._last)).endswith(_TERMINAL)

    def settle(self) -> int:
        """What is still to be charged, or given back if below 0, by the engine's own count; 0 if it told none."""
        counts = (_tokens_in(data) for data in EventReader().feed(b"".join(self._last)))
        said = [count for count in counts if count is not None]
        if not said:
            return 0
        before = self.charged
        self._prompt, self._generated = said[-1].prompt, said[-1].generated
        return self.charged - before


def _tokens_in(data: bytes) -> Tokens | None:
    if data == DONE:
        return None
    try:
        frame = msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, ValueError):  # the tail of a frame whose beginning is in an earlier chunk
        return None
    usage, timings = frame.get("usage"), frame.get("timings")
    if isinstance(usage, Mapping):
        return Tokens(_sum(usage, "prompt_tokens"), _sum(usage, "completion_tokens"))
    if isinstance(timings, Mapping):
        return Tokens(_sum(timings, "cache_n", "prompt_n"), _sum(timings, "predicted_n"))
    return None


def _sum(counts: Mapping[str, Any], *names: str) -> int:
    return sum(count for name in names if isinstance(count := counts.get(name), int) and count > 0)


async def open_metered(
    dispatcher: Dispatcher, request: EngineRequest, on_progress: ProgressSink, permit: Permit, account: Account
) -> EngineStream:
    """Open a stream on a permit, and tell the account of it.

    The prompt is paid for from now on, also by whoever leaves while it is read; not when the request is refused, nor by
    whoever leaves before an engine was given it.
    """
    tally, sent = Tally(request), asyncio.Event()
    permit.charge(tally.charged)
    try:
        stream = await dispatcher.open(request, on_progress, sent.set)
    except BaseException as error:
        if not (sent.is_set() and isinstance(error, asyncio.CancelledError)):
            permit.charge(-tally.charged)
        raise
    if stream.status >= 400:
        permit.charge(-tally.charged)
        return stream
    account.began()
    return MeteredStream(stream, tally, permit, account)


class MeteredStream:
    """An engine's stream that charges a permit with what passes, and an account at its end. See `EngineStream`."""

    def __init__(self, stream: EngineStream, tally: Tally, permit: Permit, account: Account) -> None:
        self._stream, self._tally, self._permit, self._account = stream, tally, permit, account
        self.status, self.headers = stream.status, stream.headers
        self.model, self.node_id, self.instance_id = stream.model, stream.node_id, stream.instance_id

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._stream:
            self._permit.charge(self._tally.feed(chunk))
            if self._tally.ended:  # nothing is owed any more to whoever has read the end and asks again
                self._permit.charge(self._tally.settle())
                self._permit.release()
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()
        self._permit.charge(self._tally.settle())
        tokens = self._tally.tokens
        self._account.prompt_tokens, self._account.generated_tokens = tokens.prompt, tokens.generated
