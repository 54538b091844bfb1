"""One engine's HTTP response as the head reads it."""

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self

from sollol.errors import Reason, Refusal, Retry, SollolError

WINDOW_BYTES = 262_144
"""What a stream holds at most that its reader has not taken; granted again in halves."""
_GRANT_BYTES = WINDOW_BYTES // 2
CANCELLED = Refusal(reason=Reason.CANCELLED, message="the reader let go of this stream")


class Uplink(Protocol):
    """Where a stream's own frames go."""

    def grant(self, number: int, credit: int) -> None: ...

    def cancel(self, number: int) -> None: ...


class RelayStream:
    """One HTTP response of one engine. For one reader; leaving `async with` frees the engine's slot at once.

    Iterating gives the body's bytes in pieces of any size and ends where the engine's body ends. `response` and the
    iteration raise SollolError: the agent's refusal, AGENT_UNREACHABLE when the call broke, CANCELLED after `cancel`.
    """

    def __init__(self, call: Uplink, number: int) -> None:
        self._call = call
        self._number = number
        self._head: tuple[int, dict[str, str]] | None = None
        self._pieces: list[bytes] = []
        self._unread_bytes = 0
        self._taken_bytes = 0  # taken by the reader and not granted again yet
        self._ended = False
        self._refusal: Refusal | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._waiting_since = 0.0
        self._silence_s = 0.0
        self._silence_timer: asyncio.TimerHandle | None = None

    async def response(self) -> tuple[int, Mapping[str, str]]:
        """Return the engine's status and headers (names in lower case), once they are known."""
        while self._head is None:
            if self._ended:
                raise SollolError(self._refusal or _no_head())
            await self._changed()
        return self._head

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        while not self._pieces:
            if self._ended:
                if self._refusal is not None:
                    raise SollolError(self._refusal)
                raise StopAsyncIteration
            await self._changed()
        pieces = self._pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._unread_bytes = 0
        self._taken_bytes += len(data)
        if self._taken_bytes >= _GRANT_BYTES and not self._ended:
            self._call.grant(self._number, self._taken_bytes)
            self._taken_bytes = 0
        return data

    def limit_silence(self, seconds: float) -> None:
        """From now on, end the stream with STREAM_STALLED when its reader waits this long for a byte.

        One timer per stream and period: a time-out around each piece costs more than the rest of reading it.
        """
        self._silence_s = seconds
        if self._silence_timer is not None:
            self._silence_timer.cancel()
        if not self._ended:
            self._silence_timer = asyncio.get_running_loop().call_later(seconds, self._check_silence)

    def _check_silence(self) -> None:
        loop = asyncio.get_running_loop()
        waited = loop.time() - self._waiting_since if self._waiter is not None else 0.0
        if waited < self._silence_s:
            self._silence_timer = loop.call_later(self._silence_s - waited, self._check_silence)
            return
        self._call.cancel(self._number)
        message = f"the engine sent nothing for {self._silence_s:.0f} s in mid-stream"
        self.end(Refusal(reason=Reason.STREAM_STALLED, message=message, retry=Retry.RETRYABLE))

    def cancel(self) -> None:
        """Let go of the stream; safe to call again, and after its end."""
        if not self._ended:
            self._call.cancel(self._number)
            self.end(CANCELLED)
        self._pieces.clear()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    async def _changed(self) -> None:
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        self._waiting_since = loop.time()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def head(self, status: int, headers: dict[str, str]) -> None:
        self._head = (status, headers)
        self._wake()

    def data(self, data: bytes) -> None:
        self._pieces.append(data)
        self._unread_bytes += len(data)
        if self._unread_bytes + self._taken_bytes > WINDOW_BYTES:
            self._call.cancel(self._number)
            self.end(Refusal(reason=Reason.INTERNAL, message="the agent sent more than its credit; update it"))
        self._wake()

    def end(self, refusal: Refusal | None) -> None:
        self._ended = True
        self._refusal = refusal
        if self._silence_timer is not None:
            self._silence_timer.cancel()
        self._wake()


def _no_head() -> Refusal:
    return Refusal(reason=Reason.INTERNAL, message="the agent ended the stream without the engine's answer")
